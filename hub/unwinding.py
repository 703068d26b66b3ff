"""SIGTERM and SIGHUP end a verb as Ctrl-C does: the stack unwinds, so that what was staged is removed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)
_ONE_SIGNAL_SECONDS: Final = 1.0


class _Unwind:
    """Raises SystemExit with the status that shells give a process ended by this signal."""

    def __init__(self) -> None:
        self.raised: float | None = None  # when

    def __call__(self, number: int, frame: FrameType | None) -> None:
        # timeout(1) tells the process and then its group: the second telling must not cut the tidying short.
        if self.raised is None or time.monotonic() - self.raised >= _ONE_SIGNAL_SECONDS:
            self.raised = time.monotonic()
            raise SystemExit(128 + number)


@contextmanager
def unwinding() -> Iterator[None]:
    """While inside, SIGTERM and SIGHUP unwind this process; what is ignored (nohup) or handled already stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    unwind = _Unwind()
    for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, unwind)
    try:
        yield
    finally:
        if unwind.raised is None:  # else the second telling may still come
            end_at_once(*_SIGNALS)


def end_at_once(*numbers: int) -> None:
    """Let these signals end the process where it stands again: for servers, and where the main thread waits in C."""
    for number in numbers:
        if isinstance(signal.getsignal(number), _Unwind):
            signal.signal(number, signal.SIG_DFL)


# A forked child has its parent's stack, but nothing on it is the child's to tidy.
os.register_at_fork(after_in_child=lambda: end_at_once(*_SIGNALS))
