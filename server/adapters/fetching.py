"""Several slow things at once, each in a thread, so that one that hangs holds up nobody else."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from server.adapters.priority import give_way


class FetchThreads:
    """At most `threads` daemon threads, started when first needed, that run jobs in the order given.

    A job takes care of its own errors. `close` drops the jobs not yet begun and does not wait for those that are:
    a hub that hangs must not keep the server from ending.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._most = max(threads, 1)
        self._name = name
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._started = 0
        self._idle = 0
        self._closed = False

    def run(self, job: Callable[[], None]) -> None:
        """Have `job` run as soon as a thread is free."""
        with self._changed:
            if self._closed:
                return
            self._jobs.append(job)
            if len(self._jobs) > self._idle and self._started < self._most:
                self._started += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()
            self._changed.notify()

    def close(self) -> None:
        """End the threads as they become free."""
        with self._changed:
            self._closed = True
            self._jobs.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        give_way()
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._jobs or self._closed)
                self._idle -= 1
                if self._closed:
                    return
                job = self._jobs.popleft()
            job()
