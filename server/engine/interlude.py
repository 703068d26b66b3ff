"""Interludes: a newcomer's prompt, computed while a crowded step rests between two layers.

Whoever comes while a flood fills every step would wait for the running step to end, and then for his own, which the
flood's answers make longer: several times what his prompt takes alone. On a processor a step can rest between two
layers, so that he is computed at once and alone. That makes everybody else's next token late, and an idle pass over the
weights is paid for a few tokens, so interludes have a share of the time and no more: beyond it newcomers take their
turn in the ordinary way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 1 / 3  # of the time, in the long run
SAVED = 1.0  # seconds that may be saved up for a moment when several come


class Interludes:
    """Counts the time they had. `clock`: seconds, as `time.monotonic`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = 0.0  # all of them together
        self._clock = clock
        self._saved = SAVED
        self._counted = clock()

    def due(self) -> bool:
        """Whether their share of the time is not used up."""
        now = self._clock()
        self._saved = min(SAVED, self._saved + SHARE * (now - self._counted))
        self._counted = now
        return self._saved > 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What runs within is one. A long one is allowed, and owed for."""
        started = self._clock()
        try:
            yield
        finally:
            took = self._clock() - started
            self.seconds += took
            self._saved -= took
