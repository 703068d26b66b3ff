"""How long a call may wait for its caller: each that waits holds one of the server's threads, and perhaps a place.

What counts is the time in which the server waits for the caller (a part of an upload that does not come, a part of an
answer that is not taken), never the time the server works.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import grpc

log = logging.getLogger(__name__)
IDLE_SECONDS: Final = 60.0
T = TypeVar("T")


class Patience:
    """Cancels calls whose caller neither sends nor takes anything for `seconds`; safe to use from several threads."""

    def __init__(self, seconds: float = IDLE_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._waiting: dict[object, tuple[float, grpc.ServicerContext]] = {}  # since when (monotonic), and which call
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, name="loraplex-patience", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self, context: grpc.ServicerContext) -> Iterator[None]:
        """The server waits for this call's caller meanwhile."""
        key = object()
        with self._lock:
            self._waiting[key] = (time.monotonic(), context)
        try:
            yield
        finally:
            with self._lock:
                del self._waiting[key]

    def sent(self, parts: Iterator[T], context: grpc.ServicerContext) -> Iterator[T]:
        """What the caller sends, part by part."""
        end: Any = object()
        while True:
            with self.waiting(context):
                part = next(parts, end)
            if part is end:
                return
            yield part

    def close(self) -> None:
        """Let every call wait as long as it likes."""
        self._closed.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            before = time.monotonic() - self._seconds
            with self._lock:
                late = [context for since, context in self._waiting.values() if since < before]
            for context in late:
                log.warning("a call was ended: its caller sent and took nothing for %g s", self._seconds)
                context.cancel()  # type: ignore[no-untyped-call]
