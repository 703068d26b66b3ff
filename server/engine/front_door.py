"""Requests on their way in: other threads submit and cancel, the engine's thread takes in what came."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from server.engine.request import Request
from server.engine.sequence import Sequence
from server.errors import Draining, EngineFailed, QueueFull

FAILED = "the engine has failed; its server ends"


class FrontDoor:
    """Arrivals, cancellations and who is inside, under one lock. At most `max_waiting` requests wait, and of one
    tenant at most `max_waiting_per_tenant`."""

    def __init__(self, max_waiting: int, max_waiting_per_tenant: int) -> None:
        self._max_waiting = max_waiting
        self._max_waiting_per_tenant = max_waiting_per_tenant
        self._changed = threading.Condition()
        self._arrivals: list[Sequence] = []
        self._cancelled: set[str] = set()
        self._inside: dict[str, Sequence] = {}
        self._waiting: Counter[str] = Counter()  # by tenant
        self._draining = False
        self._closed = False
        self._failed = False
        self._awake = False

    # -- for other threads ---------------------------------------------------------------------------------------

    def admit(self, request: Request, begin: Callable[[], Sequence]) -> None:
        """Let a request in, as the sequence that `begin` makes; raises `Draining`, `EngineFailed` or `QueueFull`."""
        with self._changed:
            if self._failed:
                raise EngineFailed(FAILED)
            if self._draining or self._closed:
                raise Draining("the server is shutting down")
            if self._waiting.total() >= self._max_waiting:
                raise QueueFull(f"{self._waiting.total()} requests wait already")
            if self._waiting[request.tenant] >= self._max_waiting_per_tenant:
                raise QueueFull(f"{self._waiting[request.tenant]} requests of yours wait already")
            if request.id in self._inside:
                raise AssertionError(f"request id {request.id} is in use")
            sequence = begin()
            self._inside[request.id] = sequence
            self._waiting[request.tenant] += 1
            self._arrivals.append(sequence)
            self._changed.notify_all()

    def cancel(self, request_id: str) -> None:
        """Have a request end early; unknown or ended ids are ignored."""
        with self._changed:
            if request_id in self._inside:
                self._cancelled.add(request_id)
                self._changed.notify_all()

    def wake(self) -> None:
        """Have the engine's thread look again: something it waits for elsewhere has come."""
        with self._changed:
            self._awake = True
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those inside; False when some are still there after `seconds`."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._inside, seconds)

    def close(self) -> None:
        """Refuse new requests and have the engine's thread stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fail(self) -> None:
        """Refuse new requests for good: the engine's thread has failed."""
        with self._changed:
            self._failed = self._closed = True
            self._changed.notify_all()

    # -- for the engine's thread ---------------------------------------------------------------------------------

    def wait(self, has_work: Callable[[], bool]) -> bool:
        """Wait for something to do, here or by `has_work`; False when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._called(has_work))
            return not self._closed

    def _called(self, has_work: Callable[[], bool]) -> bool:
        """Whether the engine's thread has something to do."""
        return bool(self._awake or self._arrivals or self._cancelled or has_work())

    @property
    def awake(self) -> bool:
        """Whether somebody called `wake` since the last call of `cancelled`."""
        return self._awake

    @property
    def crowded(self) -> bool:
        """Whether somebody arrived since the last call of `arrivals`."""
        return bool(self._arrivals)

    def arrivals(self) -> list[Sequence]:
        """Who arrived since the last call."""
        with self._changed:
            arrivals, self._arrivals = self._arrivals, []
        return arrivals

    def cancelled(self) -> list[Sequence]:
        """Who is inside and to be cancelled; the engine's thread looks at everything that came after this call."""
        with self._changed:
            self._awake = False
            cancelled = [self._inside[i] for i in self._cancelled if i in self._inside]
            self._cancelled.clear()
        return cancelled

    def leave(self, sequence: Sequence) -> None:
        """A sequence ended."""
        with self._changed:
            self._inside.pop(sequence.request.id, None)
            self._changed.notify_all()

    def inside(self) -> dict[str, Sequence]:
        """Who is inside, by request id."""
        with self._changed:
            return dict(self._inside)

    def count_waiting(self, queued: Counter[str]) -> None:
        """Bounds count `queued`, the waiting requests by tenant, and those not yet taken in."""
        with self._changed:
            self._waiting = Counter(queued)
            self._waiting.update(sequence.request.tenant for sequence in self._arrivals)
