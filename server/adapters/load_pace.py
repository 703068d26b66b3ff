"""How much of a core loading may take from those who are being answered.

Where every core computes, whatever a loader does makes steps longer, low priority or not: the threads of a step wait
for each other. So loading has an allowance: a share of one core, saved up while it is not used, and as much as it
likes while nothing is being computed. What it saves on is time, not order: a request whose adapter is not there waits
a little longer, so that all the others do not. A little: a load that took more than the share of `LONGEST` seconds is
charged no more than that, or one expensive adapter would keep all the others away for ten times as long as it took.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

SHARE = 0.1  # of one core
SAVED = 0.1  # seconds of a core that may be used at once
LONGEST = 2.0  # seconds that a load may keep the next one waiting


def every_core_computes() -> bool:
    """Whether torch's threads leave this process no core for anything else."""
    return torch.get_num_threads() >= len(os.sched_getaffinity(0))


class LoadPace:
    """Shared by all loader threads. `busy`: whether somebody is being answered; None: never wait."""

    def __init__(
        self,
        busy: Callable[[], bool] | None = None,
        share: float = SHARE,
        saved: float = SAVED,
        clock: Callable[[], float] = time.monotonic,
        spent: Callable[[], float] = time.thread_time,
    ) -> None:
        self._busy = busy
        self._share = share
        self._saved = saved
        self._clock = clock
        self._spent = spent
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._allowance = saved
        self._seen = clock()
        self._expected = 0.01  # seconds of a core that a load takes: a running mean

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until there is an allowance, then charge it with the processor time that the body takes."""
        while (expected := self._begin()) is None:
            if self._closed.wait(0.005):
                break
        before = self._spent()
        try:
            yield
        finally:
            self._end(self._spent() - before, expected or 0.0)

    @contextmanager
    def charged(self) -> Iterator[None]:
        """Charge the allowance with the body's processor time too: what a load takes after its turn. Never waits."""
        before = self._spent()
        try:
            yield
        finally:
            took = self._spent() - before
            with self._lock:
                self._charge(took)

    def close(self) -> None:
        """From now on nobody waits."""
        self._closed.set()

    def _begin(self) -> float | None:
        """Take what a load will probably cost, so that many threads cannot all use the same allowance; None: wait."""
        with self._lock:
            self._save_up()
            if self._allowance <= 0 and self._busy is not None and self._busy():
                return None
            expected = min(self._expected, self._share * LONGEST)
            self._allowance -= expected
            return expected

    def _end(self, took: float, expected: float) -> None:
        with self._lock:
            self._charge(took, expected)
            self._expected += 0.2 * (took - self._expected)

    def _charge(self, took: float, charged: float = 0.0) -> None:
        """Under the lock: `took` seconds of a core were used, of which `charged` were charged before."""
        self._save_up()  # what was saved meanwhile counts before the debt is cut, or nobody would ever wait
        self._allowance = max(self._allowance + charged - took, -self._share * LONGEST)

    def _save_up(self) -> None:
        now = self._clock()
        self._allowance = min(self._saved, self._allowance + self._share * (now - self._seen))
        self._seen = now
