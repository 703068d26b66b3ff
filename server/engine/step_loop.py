"""The step loop: sole owner of everything mutable about running requests. Its thread takes in, schedules, computes,
samples and answers; nobody else touches a sequence after the front door let it in."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from server.engine.foresight import Ahead, Foresight
from server.engine.front_door import FAILED, FrontDoor
from server.engine.interlude import Interludes
from server.engine.kv_cache import PageTable
from server.engine.observer import EngineObserver, EngineSnapshot, SchedulerReports
from server.engine.pace import Pace
from server.engine.request import Delta
from server.engine.sampler import Choose, sample
from server.engine.scheduler import Scheduler, Share
from server.engine.sequence import Sequence, Taken
from server.errors import Cancelled, Draining, EngineFailed, NonFiniteLogits

log = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0005
_OUT_OF_MEMORY = 2  # CUDA's number for it; what failed for this alone may do better the next time


class ComputedStep(Protocol):
    """A step that was run."""

    @property
    def shares(self) -> Seq[Share]:
        """All that took part."""

    @property
    def sampling(self) -> Seq[Share]:
        """Those whose next token is wanted, in the order of the logits."""


Forward = Callable[[Seq[Share]], tuple[ComputedStep, Tensor]]
"""Computes shares: the step that was run, and its logits [S, vocabulary] in float32."""

RestingForward = Callable[[Seq[Share], Callable[[], None]], tuple[ComputedStep, Tensor]]
"""The same; calls its second argument now and then between two layers, which may compute other shares meanwhile."""


Read = Callable[[Seq[Share]], Iterable[tuple[Share, Tensor]]]
"""Computes prompts that are only read: each share with the states [tokens, hidden] of its tokens in float32."""


class StepLoop:
    """Runs steps of `scheduler` by `forward`. `long_from`: the length at which all keys of a sequence change, or None
    where the model has none (see `model.longrope`). `resting`: `forward` in a way that newcomers need not wait for,
    where there is one (see `interlude.py`). `read`: the way of prompts that are only read (see `reading.py`). `ahead`:
    where there is a device that computes by itself; somebody calls `meanwhile` while it does, and what a step chose is
    handed out then."""

    def __init__(
        self,
        door: FrontDoor,
        scheduler: Scheduler,
        pages: PageTable,
        forward: Forward,
        observer: EngineObserver,
        reports: SchedulerReports,
        long_from: int | None,
        pace: Pace,
        choose: Choose = sample,
        resting: RestingForward | None = None,
        read: Read = lambda shares: (),
        ahead: Ahead | None = None,
    ) -> None:
        self.observer = observer
        self.snapshot = EngineSnapshot(kv_pages_total=pages.pages)
        self._door = door
        self._scheduler = scheduler
        self._pages = pages
        self._forward = forward
        self._reports = reports
        self._long_from = long_from
        self._pace = pace
        self._choose = choose
        self._resting = resting
        self._read = read
        self._interludes = Interludes()
        self._foresight = None if ahead is None else Foresight(door, scheduler, ahead)
        self._told: list[tuple[Sequence, Taken]] = []  # chosen, and not yet handed out
        self._noted = True
        self.ended = threading.Event()  # set when `run` is over, for whatever reason

    def run(self) -> None:
        """The engine's thread: until the door is closed; who is inside then ends with `Draining`. What nobody caught
        closes the door and ends everybody with `EngineFailed`."""
        # A step takes the interpreter's lock back dozens of times; a loader that parses would keep it 5 ms each time.
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        try:
            while self._door.wait(self._scheduler.has_work):
                self.advance()
                if not self._scheduler.running:
                    self.deliver()  # nobody knows when the next step will
            self.deliver()
            for sequence in self._door.inside().values():
                self._end(sequence, Draining("the server is shutting down"))
        except Exception:
            log.exception("the engine has failed")
            self._fail()
        finally:
            self.ended.set()

    def _fail(self) -> None:
        """End everybody, by what cannot have broken: neither scheduler nor pages are asked any more."""
        self._door.fail()
        # Who got a last token has left, and may not have been told.
        left = {sequence.request.id: sequence for sequence, taken in self._told if taken.reason is not None}
        for sequence in (left | self._door.inside()).values():
            self._door.leave(sequence)
            error = EngineFailed(FAILED)
            if not sequence.reads:
                self.observer.finished(sequence.request, None, error)
            sequence.outbox.put(Delta(error=error))

    def advance(self) -> None:
        """Take in what came, run one step if there is something to run, note the state; never waits."""
        self._take_in()
        shares = [] if self._foresight is None else self._foresight.shares()
        crowded = not shares and self._resting is not None and self._scheduler.crowded
        if crowded:
            self._let_in()
        if not shares:
            shares = self._scheduler.schedule()
        if not shares:
            self.deliver()
        self._compute(shares, may_rest=crowded)
        self._noted = False
        if self._foresight is None:
            self.deliver()

    def meanwhile(self, tokens: Tensor) -> None:
        """While the device computes a step: launch the one behind it, and hand out what the one before it chose.

        tokens: [S] on the device, what the step will have chosen.
        """
        if self._foresight is not None:
            self._foresight.look(tokens)
        self.deliver()

    def deliver(self) -> None:
        """Hand out what the last step chose, and note the state, where that has not been done."""
        told, self._told = self._told, []
        for sequence, taken in told:
            request = sequence.request
            try:
                delta = sequence.tell(taken)
            except Exception:
                failed = _wordless()
                if taken.reason is None:
                    sequence.refused = failed  # ended when the engine next takes requests in
                else:
                    self.observer.finished(request, None, failed)
                    sequence.outbox.put(Delta(error=failed))
                continue
            if taken.first:
                self.observer.first_token(request, taken.seconds)
            else:
                self.observer.tokens(request, 1, taken.seconds)
            if delta.finish is not None:
                self.observer.finished(request, delta.finish, None)
            sequence.outbox.put(delta)
        if not self._noted:
            self._noted = True
            self._note()

    def _compute(self, shares: Seq[Share], *, may_rest: bool = False) -> None:
        self._attempt(self._read_step, [share for share in shares if share.sequence.reads])
        answering = [share for share in shares if not share.sequence.reads]
        self._attempt(partial(self._step, may_rest=may_rest), answering)

    def _attempt(self, step: Callable[[Seq[Share]], None], shares: Seq[Share]) -> None:
        if not shares:
            return
        try:
            step(shares)
        except Exception as error:
            if _is_lost(error):
                raise
            log.exception("an engine step failed")
            for share in shares:
                if share.sequence.order:  # who has left was told
                    self._end(share.sequence, EngineFailed("the step failed; the request may be sent again"))

    def _read_step(self, shares: Seq[Share]) -> None:
        """A step of prompts that are only read."""
        started = time.monotonic()
        for share, states in list(self._read(shares)):
            sequence, whole = share.sequence, share.samples
            sequence.read(states)
            if whole:
                self._tell(sequence)
        seconds, tokens = time.monotonic() - started, sum(share.tokens for share in shares)
        self.observer.step(seconds=seconds, sequences=len(shares), adapters=0, tokens=tokens)

    def _tell(self, sequence: Sequence) -> None:
        """The end of a prompt that was read: the mean of its states."""
        if sequence.states is None:
            raise AssertionError("nothing was read")
        embedding = (sequence.states / len(sequence.tokens)).float()
        if not bool(embedding.isfinite().all()):
            sequence.tainted = True
            self._end(sequence, NonFiniteLogits("the base's hidden states of the prompt are not finite"))
            return
        self._leave(sequence)
        sequence.outbox.put(Delta(embedding=embedding))

    def _step(self, shares: Seq[Share], may_rest: bool) -> None:
        started, lent = time.monotonic(), self._interludes.seconds
        if may_rest and self._resting is not None:
            step, logits = self._resting(shares, self._at_rest)
        else:
            step, logits = self._forward(shares)
        self._postprocess(step, logits)
        seconds = time.monotonic() - started - (self._interludes.seconds - lent)
        answers = sum(share.tokens == 1 for share in shares)
        self._pace.saw(answers, sum(share.tokens for share in shares) - answers, seconds)
        self.observer.step(
            seconds=seconds,
            sequences=len(shares),
            adapters=len({use.digest for share in shares for use in share.sequence.request.adapters}),
            tokens=sum(share.tokens for share in shares),
        )

    def _let_in(self) -> None:
        """Compute newcomers' prompts ahead of the step that is about to begin."""
        if not self._interludes.due():
            return
        before = self._interludes.seconds
        with self._interludes.timed():
            shares = self._scheduler.newcomers()
            self._compute(shares)
        if shares:
            self.observer.interlude(self._interludes.seconds - before)

    def _at_rest(self) -> None:
        """The same while a step rests between two layers, for those who came meanwhile."""
        arrivals = self._door.arrivals()
        for sequence in arrivals:
            self._scheduler.waiting.add(sequence)
        if arrivals or self._door.awake:
            self._let_in()

    def _postprocess(self, step: ComputedStep, logits: Tensor) -> None:
        for share in step.shares:
            share.sequence.computed += share.tokens
        if self._foresight is not None:
            self._foresight.choosing = step.sampling if len(step.sampling) == len(step.shares) else ()
        choices = self._choose(logits, [share.sequence.sampler for share in step.sampling])
        for share, choice in zip(step.sampling, choices, strict=True):
            sequence = share.sequence
            if choice.token_id is None:
                sequence.tainted = True  # its pages are scrubbed before anybody else gets them
                self._end(sequence, choice.error or EngineFailed("no token was chosen"))
                continue
            try:
                taken = sequence.take(choice)
            except Exception:
                self._end(sequence, _wordless())
                continue
            if len(sequence.tokens) == self._long_from:
                sequence.computed = 0  # all of its tokens rotate differently from here on
            if taken.first or taken.reason is not None:
                self._scheduler.keep(sequence)
            if taken.reason is not None:
                self._leave(sequence)
            self._told.append((sequence, taken))
        if self._foresight is None:
            self.deliver()

    def _take_in(self) -> None:
        """Take arrivals and cancellations in, and end what failed to load."""
        cancelled = self._door.cancelled()
        for sequence in self._door.arrivals():
            self._scheduler.waiting.add(sequence)
        for sequence in cancelled:
            self._end(sequence, Cancelled("the caller went away"))
        for sequence in self._scheduler.failed():
            self._end(sequence, sequence.ticket.error or sequence.refused or EngineFailed("no reason was recorded"))

    def _end(self, sequence: Sequence, error: Exception) -> None:
        self.deliver()  # in the order of events
        self._leave(sequence)
        if not sequence.reads:
            self.observer.finished(sequence.request, None, error)
        sequence.outbox.put(Delta(error=error))

    def _leave(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._door.leave(sequence)

    def _note(self) -> None:
        scheduler = self._scheduler
        self.snapshot = EngineSnapshot(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_pages_used=self._pages.used,
            kv_pages_total=self._pages.pages,
            kv_pages_cached=self._pages.cached,
            prefix_hit_tokens=self._reports.prefix_hit_tokens,
            running_adapters=frozenset(u.version for s in scheduler.running for u in s.request.adapters),
            waiting_adapters=frozenset(u.version for s in scheduler.waiting for u in s.request.adapters),
        )
        self._door.count_waiting(Counter(scheduler.waiting.waiting_of()))


def _wordless() -> EngineFailed:
    """The end of an answer with a token that has no text; for whoever handles why, which is logged."""
    log.exception("a token could not be put into words")
    return EngineFailed("the answer could not be put into words")


def _is_lost(error: Exception) -> bool:
    """Whether the device is lost to this process, as after an illegal access or a fault of its memory: all that is
    asked of it afterwards fails too."""
    return isinstance(error, torch.AcceleratorError) and getattr(error, "error_code", None) != _OUT_OF_MEMORY
