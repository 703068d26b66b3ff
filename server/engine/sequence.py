"""A request while it runs: everything mutable about one answer. Owned by the engine thread alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.adapters.parts import AdapterParts
from server.adapters.residency import Ticket
from server.engine.outbox import Outbox
from server.engine.prefix import PageKey
from server.engine.request import Delta, Finish, FinishReason, Request, Timing, TokenLogprobs, Usage
from server.engine.sampler import Choice, SamplerState
from server.model.text import Detokenizer, StopScanner


@dataclass(eq=False)
class Taken:
    """A token that was taken in. seconds: since the one before it, or since the request came."""

    token: int
    logprobs: TokenLogprobs | None
    seconds: float
    first: bool
    reason: FinishReason | None = None
    text: str | None = None  # where it had to be known at once


@dataclass(eq=False)
class Sequence:
    """One answer in the making."""

    request: Request
    outbox: Outbox
    ticket: Ticket
    stop_ids: frozenset[int]
    sampler: SamplerState
    detokenizer: Detokenizer
    scanner: StopScanner
    tokens: list[int] = field(default_factory=list)  # the prompt, then what was produced
    computed: int = 0  # leading tokens whose keys and values are in the cache
    pages: list[int] = field(default_factory=list)
    adapter_rows: tuple[tuple[int, int, float], ...] = ()  # (first row, one past the last, weight), while leased
    parts: tuple[tuple[AdapterParts, float], ...] = ()  # what its adapters do beside their rows, with weights
    refused: Exception | None = None  # why its adapters mean nothing together
    order: int = 0  # of arrival, from 1; 0 while the scheduler does not know it
    charged: int = 0  # leading tokens that its tenant was charged for
    keys: list[PageKey] = field(default_factory=list)  # of its first full pages
    kept: int = 0  # leading pages that were offered to others
    tainted: bool = False  # a page of its own may hold NaN or infinity
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    states: Tensor | None = None  # [hidden] float64: of a prompt that is only read, the sum over computed tokens
    _flow: tuple[str, ...] | None = None

    @property
    def pending(self) -> int:
        """Tokens still to be computed before the next one can be sampled."""
        return len(self.tokens) - self.computed

    @property
    def produced(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def ends_next(self) -> bool:
        """Whether its next token is its last, whatever that is."""
        return self.produced + 1 >= self.request.stopping.max_new_tokens

    @property
    def reads(self) -> bool:
        """Whether its prompt is only read."""
        return self.request.read_layer is not None

    def read(self, states: Tensor) -> None:
        """Take the states [tokens, hidden] of its next tokens in. Who was preempted begins anew."""
        total = self.states if self.computed else None
        if total is None:
            total = torch.zeros(states.shape[1], dtype=torch.float64)
        # One after the other: the sum is the same bits wherever the prompt was cut.
        for row in states.double():
            total += row
        self.states = total
        self.computed += states.shape[0]

    def take(self, choice: Choice) -> Taken:
        """Take the next token in and decide whether the answer ends with it. Where nothing but the token decides, its
        text is left to `tell`, which must follow before the next `take`."""
        token = choice.token_id
        if token is None:
            raise AssertionError("a row without a token does not advance")
        stopping = self.request.stopping
        now = time.monotonic()
        taken = Taken(token, choice.logprobs, now - (self.last_token or self.request.arrival), self.last_token is None)
        self.tokens.append(token)
        self.first_token = self.first_token or now
        self.last_token = now
        produced = self.produced
        if token in self.stop_ids:
            taken.reason = FinishReason.STOP
        elif stopping.stop_strings:
            taken.text, stopped = self.scanner.push(self.detokenizer.push(token), self._long_enough)
            taken.reason = FinishReason.STOP_STRING if stopped else None
        if taken.reason is None and self.sampler.structure is not None and self.sampler.structure.complete:
            taken.reason = FinishReason.STOP
        if taken.reason is None and produced >= stopping.max_new_tokens:
            taken.reason = FinishReason.LENGTH
        return taken

    def tell(self, taken: Taken) -> Delta:
        """What the reader sees of a token, and whether the answer ended with it."""
        delta = Delta(token_ids=[taken.token], logprobs=[taken.logprobs] if taken.logprobs else [])
        if taken.first:
            delta.warnings = list(self.ticket.warnings)
        if taken.text is not None:
            delta.text = taken.text
        elif taken.token not in self.stop_ids:
            delta.text = self.detokenizer.push(taken.token)
        if taken.reason is not None:
            if taken.reason is not FinishReason.STOP_STRING:
                rest, stopped = self.scanner.push(self.detokenizer.flush(), self._long_enough)
                delta.text += rest + self.scanner.flush()
                if stopped:
                    taken.reason = FinishReason.STOP_STRING
            delta.finish = self._finish(taken.reason, self.last_token or time.monotonic())
        return delta

    @property
    def _long_enough(self) -> bool:
        """Whether a stop string may end it by now."""
        return self.produced >= self.request.stopping.min_new_tokens

    @property
    def flow(self) -> tuple[str, ...]:
        """The adapters it asks for, in one order."""
        if self._flow is None:
            self._flow = tuple(sorted(use.digest for use in self.request.adapters))
        return self._flow

    def _finish(self, reason: FinishReason, now: float) -> Finish:
        arrival = self.request.arrival
        return Finish(
            reason,
            Usage(len(self.request.prompt), self.produced),
            Timing(
                queue=(self.started or now) - arrival,
                first_token=(self.first_token or now) - arrival,
                total=now - arrival,
            ),
        )
