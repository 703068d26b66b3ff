"""What the engine tells about itself while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from server.engine.request import Finish, Request


@dataclass(frozen=True)
class EngineSnapshot:
    """The engine's state between two steps."""

    running: int = 0
    waiting: int = 0
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    kv_pages_cached: int = 0  # of those not used: pages whose content may be asked for again
    prefix_hit_tokens: int = 0  # since start: tokens whose pages were found
    running_adapters: frozenset[str] = frozenset()  # versions, "team/sentiment@3"
    waiting_adapters: frozenset[str] = frozenset()


class EngineObserver(Protocol):
    """Called on the engine's threads; must not block and must not raise."""

    def step(self, *, seconds: float, sequences: int, adapters: int, tokens: int) -> None:
        """A step ran: distinct adapters and all tokens computed in it."""

    def admitted(self, request: Request, queue_seconds: float) -> None:
        """A request got its pages and joins the next step."""

    def prefix_hit(self, request: Request, tokens: int) -> None:
        """The first `tokens` tokens of a request that joins were found in the KV cache."""

    def preempted(self, request: Request) -> None:
        """A request gave its place up and waits again; what it produced so far stands."""

    def interlude(self, seconds: float) -> None:
        """Newcomers' prompts were computed ahead of everybody else's step (see `interlude.py`)."""

    def first_token(self, request: Request, seconds: float) -> None:
        """Seconds since arrival."""

    def tokens(self, request: Request, count: int, seconds: float) -> None:
        """`count` more tokens, `seconds` after the last."""

    def finished(self, request: Request, finish: Finish | None, error: Exception | None) -> None:
        """A request ended, well or not."""

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        """An adapter reached "host" or "device"."""


class Unobserved:
    """An observer that looks away."""

    def step(self, *, seconds: float, sequences: int, adapters: int, tokens: int) -> None:
        """Nothing."""

    def admitted(self, request: Request, queue_seconds: float) -> None:
        """Nothing."""

    def prefix_hit(self, request: Request, tokens: int) -> None:
        """Nothing."""

    def preempted(self, request: Request) -> None:
        """Nothing."""

    def interlude(self, seconds: float) -> None:
        """Nothing."""

    def first_token(self, request: Request, seconds: float) -> None:
        """Nothing."""

    def tokens(self, request: Request, count: int, seconds: float) -> None:
        """Nothing."""

    def finished(self, request: Request, finish: Finish | None, error: Exception | None) -> None:
        """Nothing."""

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        """Nothing."""


class SchedulerReports:
    """What the scheduler tells, passed on to the observer, with the hits counted."""

    def __init__(self, observer: EngineObserver) -> None:
        self._observer = observer
        self.prefix_hit_tokens = 0  # since start

    def admitted(self, request: Request, queue_seconds: float) -> None:
        """See `EngineObserver`; a prompt that is only read is part of the request it is read for."""
        if request.read_layer is None:
            self._observer.admitted(request, queue_seconds)

    def prefix_hit(self, request: Request, tokens: int) -> None:
        """See `EngineObserver`."""
        self.prefix_hit_tokens += tokens
        self._observer.prefix_hit(request, tokens)

    def preempted(self, request: Request) -> None:
        """See `EngineObserver`."""
        self._observer.preempted(request)
