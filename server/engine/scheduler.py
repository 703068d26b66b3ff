"""Who takes part in the next step, and with how many tokens."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from server.adapters.residency import Residency
from server.engine.fair_queue import FairQueue
from server.engine.kv_cache import PageTable
from server.engine.pace import Pace
from server.engine.prefix import extend_keys, root_key
from server.engine.request import Request
from server.engine.sequence import Sequence
from server.errors import InvalidRequest


@dataclass(frozen=True)
class Share:
    """One sequence's part in a step: its next `tokens` uncomputed tokens."""

    sequence: Sequence
    tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's end, so that its next token can be chosen."""
        return self.tokens == self.sequence.pending


class PageMemory(Protocol):
    """What the scheduler needs of the pages' memory, `model.attention.PagedKv`."""

    @property
    def read_past_ends(self) -> bool:
        """Whether what a page holds behind a sequence's last token is read, to be weighed with zero."""
        ...

    def finite(self, pages: Seq[int]) -> list[bool]:
        """For each page, whether it holds neither NaN nor infinity."""

    def scrub(self, pages: Seq[int]) -> None:
        """Zero pages."""


class Watcher(Protocol):
    """Who is told what the scheduler decided."""

    def admitted(self, request: Request, queue_seconds: float) -> None:
        """A request joins the next step for the first time."""

    def prefix_hit(self, request: Request, tokens: int) -> None:
        """`tokens` need not be computed."""

    def preempted(self, request: Request) -> None:
        """A request gave its pages up and waits again."""


class Scheduler:
    """Continuous batching with chunked prompts, fair between tenants and between a tenant's adapters.

    Running sequences get one token each first; what is left of the token budget goes to prompts, the least served
    line first; beside answers they are paced (`pace.py`), but for a line's only one. A waiting request joins when it is
    its turn, its adapters are on the device and there is room for the tokens it has now; pages for its answer are taken
    as it grows. When they run out, the youngest sequence of the line with the most running ones goes back to the queue
    with its tokens and is computed anew later. The same happens to it when a line that runs at least two fewer has its
    turn and finds no place.

    A sequence begins with the pages that an earlier one with the same adapters, weights and tokens left (adapters that
    change no key and no value do not count), except for the page of its last token: that one must be computed, for its
    logits choose the next token.

    Prompts that are only read take part as others do, but begin with nobody's pages and leave none: theirs hold keys
    and values of the first layers alone.
    """

    def __init__(
        self,
        pages: PageTable,
        memory: PageMemory,
        residency: Residency,
        max_sequences: int,
        max_batch_tokens: int,
        watcher: Watcher,
        *,
        prefix_cache: bool = True,
        pace: Pace | None = None,
    ) -> None:
        self._pages = pages
        self._pace = pace
        self._memory = memory
        self._residency = residency
        # One token each for all that run is the least a step must have room for, or a prompt could wait for ever.
        self._slots = min(max_sequences, max_batch_tokens)
        self._max_batch_tokens = max_batch_tokens
        self._watcher = watcher
        self._prefix_cache = prefix_cache
        self.waiting = FairQueue()
        self.running: list[Sequence] = []

    def schedule(self) -> list[Share]:
        """The next step's shares, empty when nothing can run now."""
        self.waiting.tick()
        while len(self.running) > self._slots:  # newcomers came in between
            self._preempt(self._heaviest(self.running))
        self._admit()
        self._residency.passed_over()
        budget = self._max_batch_tokens
        paced = self._paced()
        shares = []
        whole = len(self.running)
        for sequence in self._turns():
            if len(self.running) < whole and sequence not in self.running:
                continue  # it gave its pages to one before it
            prompt = sequence.pending > 1
            # A line's only running request waits for its first token, and owes nobody smoothness: it is not paced.
            slow = prompt and self.waiting.lines(sequence)[1].running > 1
            tokens = self._grow(sequence, min(sequence.pending, budget, paced if slow else budget))
            if tokens:
                shares.append(Share(sequence, tokens))
                budget -= tokens
                paced = max(0, paced - tokens) if prompt else paced
        if len(self.running) < whole:
            shares = [share for share in shares if share.sequence in self.running]
        for share in shares:
            self._charge(share.sequence, share.sequence.computed + share.tokens)
        return shares

    def foresee(self, sequences: Seq[Sequence]) -> list[Sequence]:
        """Which of these, whose next token is being chosen, will take part with one token in the step after that unless
        it ends them; they have the pages for it. Nobody, where somebody would have to give up pages for it."""
        going_on = [sequence for sequence in sequences if not sequence.ends_next and sequence.refused is None]
        for sequence in going_on:
            if sequence.computed // self._pages.page_tokens == len(sequence.pages):
                more = self._pages.allocate(1)
                if more is None:
                    return []
                sequence.pages += more
        return going_on

    def again(self, sequences: Seq[Sequence]) -> list[Share]:
        """The step that was foreseen: of these, who still runs, with one token each. Nobody joins it."""
        if not sequences:
            return []
        self.waiting.tick()
        foreseen = set(map(id, sequences))
        going_on = [s for s in self.running if id(s) in foreseen and s.pending == 1 and s.refused is None]
        shares = [Share(sequence, 1) for sequence in going_on]
        for share in shares:
            self._charge(share.sequence, share.sequence.computed + share.tokens)
        return shares

    @property
    def crowded(self) -> bool:
        """Whether a tenant has requests waiting although it runs several."""
        return any(tenant.crowds for tenant in self.waiting.tenants.values())

    def newcomers(self) -> list[Share]:
        """The prompts of those who need not wait for the step that runs, often nobody: of lines that run nothing beside
        one that has requests waiting although it runs several, and that were not served much more than others.

        Nobody's pages are taken for them: whoever runs may be in a step that is at rest.
        """
        shares: list[Share] = []
        budget = self._max_batch_tokens
        for sequence in self.waiting.newcomers():
            if self.waiting.lines(sequence)[1].running:
                continue  # one of a line is enough
            sequence.pages = self._known_pages(sequence)
            tokens = len(sequence.tokens) - len(sequence.pages) * self._pages.page_tokens
            lacking = self._pages.pages_for(len(sequence.tokens)) - len(sequence.pages)
            if tokens > budget or lacking > self._room(self.running) or not self._residency.begin(sequence.ticket):
                self._release_pages(sequence)
                continue
            self._start(sequence)
            if sequence.refused is None:
                shares.append(Share(sequence, self._grow(sequence, tokens)))
                budget -= tokens
        return shares

    def _room(self, running: Seq[Sequence], gained: int = 0) -> int:
        """Pages for one more beside `running`, when `gained` are given back."""
        promised = sum(self._pages.pages_for(len(s.tokens)) - len(s.pages) for s in running)
        # One page for each to grow by: who joins into the last free page is soon thrown out.
        return self._pages.free + gained - promised - len(running)

    def _paced(self) -> int:
        """Prompt tokens the next step may have beside its answers."""
        if self._pace is None:
            return self._max_batch_tokens
        answers = sum(s.pending == 1 for s in self.running)
        allowed = self._pace.prompt_tokens(answers, others=self.waiting.several_of_late)
        return self._max_batch_tokens if allowed is None else allowed

    def has_work(self) -> bool:
        """Whether the next `schedule` or `failed` has something to give, or another ticket's adapters to take back.

        Not only whether somebody's turn has come: a request behind one that was recalled may hold the rows that others
        wait for, and only a `schedule` that passes it over takes them back.
        """
        return bool(self.running) or any(s.ticket.ready or s.ticket.error is not None for s in self.waiting)

    def failed(self) -> list[Sequence]:
        """Sequences whose adapters could not be loaded, or mean nothing in the way they are asked for."""
        return [s for s in self.waiting if s.ticket.error is not None] + [s for s in self.running if s.refused]

    def keep(self, sequence: Sequence) -> None:
        """Offer the sequence's full pages to later ones. Only pages without NaN and infinity are taken."""
        full = sequence.computed // self._pages.page_tokens
        if not self._shares_pages(sequence) or full <= sequence.kept or sequence.tainted:
            return
        self._extend_keys(sequence, full)
        numbers = range(sequence.kept, full)
        finite = self._memory.finite([sequence.pages[i] for i in numbers])
        for i, clean in zip(numbers, finite, strict=True):
            if not clean:
                sequence.tainted = True
                return  # nor may the pages after it be found: they saw it
            self._pages.publish(sequence.pages[i], sequence.keys[i])
            sequence.kept = i + 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages and leases."""
        if sequence.order:
            running = sequence in self.running
            if running:
                self.running.remove(sequence)
            self.waiting.leave(sequence, running=running)
            sequence.order = 0
        self._release_pages(sequence)
        sequence.parts = ()
        self._residency.release(sequence.ticket)

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages, counts and leases add up."""
        if any(s.pages for s in self.waiting):
            raise AssertionError("a waiting sequence holds pages")
        self._pages.check_integrity(page for s in self.running for page in s.pages)
        self.waiting.check_integrity(self.running)
        self._residency.check_integrity()

    # -- joining ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        while (sequence := self.waiting.next()) is not None:
            sequence.pages = self._known_pages(sequence)
            victims = self._make_room(sequence)
            if victims is None or not self._residency.begin(sequence.ticket):
                self._release_pages(sequence)
                if victims is None:
                    return  # whose turn it is ends admission when it does not fit, or small requests would starve it
                continue
            for victim in victims:
                self._preempt(victim)
            self._start(sequence)

    def _start(self, sequence: Sequence) -> None:
        known = len(sequence.pages)
        sequence.computed = known * self._pages.page_tokens
        sequence.kept = known
        # In one order, whatever the request's: sums depend on it in their last bits, and pages are found in any.
        uses = sorted(sequence.request.adapters, key=lambda use: (use.digest, use.weight))
        sequence.adapter_rows = tuple((*self._residency.rows(use.digest), use.weight) for use in uses if use.weight)
        try:
            sequence.parts = self._residency.parts([(use.digest, use.version, use.weight) for use in uses])
        except InvalidRequest as error:
            sequence.refused = error  # `failed` finds it; until then it takes no turn
        self.waiting.start(sequence)
        self.running.append(sequence)
        sequence.charged = max(sequence.charged, sequence.computed)
        self._charge(sequence, len(sequence.tokens))
        if sequence.started is None:
            sequence.started = time.monotonic()
            self._watcher.admitted(sequence.request, sequence.started - sequence.request.arrival)
        if known:
            self._watcher.prefix_hit(sequence.request, sequence.computed)

    def _make_room(self, sequence: Sequence) -> list[Sequence] | None:
        """Whom to preempt so that `sequence` can join, often nobody; None when it must wait."""
        victims: list[Sequence] = []
        richer = self._richer(sequence)
        lacking = self._pages.pages_for(len(sequence.tokens)) - len(sequence.pages)
        while True:
            others = [s for s in self.running if s not in victims]
            gained = sum(self._pages.alone(victim.pages) for victim in victims)
            if len(others) < self._slots and (lacking <= self._room(others, gained) or not others):
                return victims
            victim = next(richer, None)
            if victim is None:
                return None
            victims.append(victim)

    def _richer(self, sequence: Sequence) -> Iterator[Sequence]:
        """Running sequences, one after the other, whose places `sequence` may claim.

        Of another tenant, or within its own tenant of another flow, as long as that one then still runs at least as
        many as the claimant: so nobody is thrown out to and fro.
        """
        claims = self.waiting.lines(sequence)
        left = list(self.running)
        while True:
            victim = None
            for level in (0, 1):
                lines = [(self.waiting.lines(s), s) for s in left]
                if level == 1:
                    lines = [(own, s) for own, s in lines if own[0] is claims[0]]
                counts = Counter(id(own[level]) for own, _ in lines)
                if counts and max(counts.values()) >= counts[id(claims[level])] + 2:
                    most = {line for line, count in counts.items() if count == max(counts.values())}
                    victim = self._heaviest([s for own, s in lines if id(own[level]) in most])
                    break
            if victim is None:
                return
            left.remove(victim)
            yield victim

    def _known_pages(self, sequence: Sequence) -> list[int]:
        if not self._shares_pages(sequence):
            return []
        usable = (len(sequence.tokens) - 1) // self._pages.page_tokens
        self._extend_keys(sequence, usable)
        return self._pages.share(sequence.keys[:usable])

    def _shares_pages(self, sequence: Sequence) -> bool:
        return self._prefix_cache and not sequence.reads

    def _extend_keys(self, sequence: Sequence, pages: int) -> None:
        # The ticket was ready before anybody asked for keys, so it knows all of its adapters.
        counting = [use for use in sequence.request.adapters if use.digest not in sequence.ticket.beside_kv]
        root = root_key(counting) if not sequence.keys else b""
        extend_keys(sequence.keys, root, sequence.tokens, self._pages.page_tokens, pages)

    # -- running ------------------------------------------------------------------------------------------------

    def _turns(self) -> list[Sequence]:
        """Running sequences in the order in which they take from the budget."""
        running = [s for s in self.running if s.refused is None]
        decodes = sorted((s for s in running if s.pending == 1), key=lambda s: s.order)
        prompts = sorted((s for s in running if s.pending > 1), key=self.waiting.standing)
        return decodes + prompts

    def _grow(self, sequence: Sequence, tokens: int) -> int:
        """Give `sequence` pages for its next `tokens` tokens; for how many of them there were some."""
        while True:
            held = len(sequence.pages) * self._pages.page_tokens - sequence.computed
            if tokens <= held:
                return tokens
            wanted = self._pages.pages_for(tokens - held)
            pages = self._pages.allocate(min(wanted, self._pages.free))
            if pages:
                sequence.pages += pages
            elif held:
                return held
            else:
                victim = self._heaviest(self.running)
                self._preempt(victim)
                if victim is sequence:
                    return 0
                continue
            tokens = min(tokens, len(sequence.pages) * self._pages.page_tokens - sequence.computed)

    def _heaviest(self, sequences: Seq[Sequence]) -> Sequence:
        """The youngest of the flow with the most running sequences, of the tenant with the most."""
        running = [(self.waiting.lines(s), s) for s in sequences]
        return max(running, key=lambda r: (r[0][0].running, r[0][1].running, r[1].order))[1]

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue: pages freed, tokens and the sampler's state kept, so that the answer goes on the same."""
        self.keep(sequence)  # if nobody needs the pages meanwhile, little has to be computed anew
        self._release_pages(sequence)
        sequence.computed = 0
        sequence.adapter_rows = ()
        sequence.parts = ()
        self.running.remove(sequence)
        self.waiting.put_back(sequence)
        self._residency.pause(sequence.ticket)
        self._watcher.preempted(sequence.request)

    def _release_pages(self, sequence: Sequence) -> None:
        # Pages without a key are this sequence's alone; those with one, and the kept ones, were looked at and are
        # sound. Of the others nobody knows: a prompt may end half computed, and finite logits do not tell of every key.
        pages = [page for page in sequence.pages[sequence.kept :] if not self._pages.keyed(page)]
        if pages and not sequence.tainted:
            # Where nobody reads past an end, whoever gets them writes first: to look would only make a device wait.
            finite = self._memory.finite(pages) if self._memory.read_past_ends else [True] * len(pages)
            pages = [page for page, clean in zip(pages, finite, strict=True) if not clean]
        if pages:
            self._memory.scrub(pages)
        sequence.tainted = False
        self._pages.release(sequence.pages)
        sequence.pages = []
        sequence.kept = 0

    def _charge(self, sequence: Sequence, tokens: int) -> None:
        """Count the sequence's first `tokens` tokens as served, each only once however often it is computed."""
        self.waiting.charge(sequence, max(0, tokens - sequence.charged))
        sequence.charged = max(sequence.charged, tokens)
