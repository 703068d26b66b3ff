"""Who takes part in the next step, and with how many tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from server.adapters.residency import Residency
from server.engine.kv_cache import PageTable
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


class Scheduler:
    """First come, first served, with continuous batching and chunked prompts.

    Running sequences get one token each first; what is left of the token budget goes to prompts. A waiting request
    joins when its adapters are on the device and pages for its whole answer are free, so it never has to be
    interrupted; requests whose adapters are still loading are passed over, not waited for.
    """

    def __init__(
        self,
        pages: PageTable,
        residency: Residency,
        max_sequences: int,
        max_batch_tokens: int,
        admitted: Callable[[Sequence], None],
    ) -> None:
        self._pages = pages
        self._residency = residency
        self._max_sequences = max_sequences
        self._max_batch_tokens = max_batch_tokens
        self._admitted = admitted
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def schedule(self) -> list[Share]:
        """The next step's shares, empty when nothing can run now."""
        self._admit()
        budget = self._max_batch_tokens
        shares = []
        for sequence in sorted(self.running, key=lambda s: s.pending > 1):
            tokens = min(sequence.pending, budget)
            if tokens:
                shares.append(Share(sequence, tokens))
                budget -= tokens
        return shares

    def has_work(self) -> bool:
        """Whether the next `schedule` or `failed` has something to give."""
        return bool(self.running) or any(s.ticket.ready or s.ticket.error for s in self.waiting)

    def failed(self) -> list[Sequence]:
        """The waiting sequences whose adapters could not be loaded."""
        return [s for s in self.waiting if s.ticket.error is not None]

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its pages and leases."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        self._pages.release(sequence.pages)
        sequence.pages = []
        sequence.parts = ()
        self._residency.release(sequence.ticket)

    def check_integrity(self) -> None:
        """Raise AssertionError unless pages and leases add up."""
        self._pages.check_integrity(page for s in self.running for page in s.pages)
        self._residency.check_integrity()

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            if len(self.running) >= self._max_sequences:
                return
            if not sequence.ticket.ready:
                continue
            request = sequence.request
            try:
                parts = self._residency.parts([(use.digest, use.version, use.weight) for use in request.adapters])
            except InvalidRequest as error:
                sequence.ticket.error = error  # `failed` finds it
                continue
            pages = self._pages.allocate(self._pages.pages_for(len(request.prompt) + request.stopping.max_new_tokens))
            if pages is None:
                return  # the first that fits no more ends admission, or small requests would starve it
            sequence.pages = pages
            sequence.adapter_rows = tuple(
                (*self._residency.rows(use.digest), use.weight) for use in request.adapters if use.weight
            )
            sequence.parts = parts
            sequence.started = time.monotonic()
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._admitted(sequence)
