"""Where one request's answer waits for its reader.

The engine thread puts, one reader takes. A slow reader never makes the engine wait and never makes memory grow
past one answer: deltas that nobody has taken are joined into one, so an outbox holds at most `max_new_tokens`
tokens whatever the reader does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from server.engine.request import Delta


class Outbox:
    """A joining mailbox of `Delta`s.

    `wake` is called from the engine thread, outside the lock, whenever something is put into an empty outbox;
    it must not block.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._lock = threading.Lock()
        self._pending: Delta | None = None

    def put(self, delta: Delta) -> None:
        """Add `delta` to what waits; the engine's side. After the last one nothing is added."""
        with self._lock:
            waiting = self._pending
            if waiting is None:
                self._pending = delta
            elif not waiting.last:
                waiting.text += delta.text
                waiting.token_ids += delta.token_ids
                waiting.logprobs += delta.logprobs
                waiting.warnings += delta.warnings
                waiting.finish = delta.finish
                waiting.error = delta.error
                waiting.embedding = delta.embedding
        if waiting is None:
            self._wake()

    def take(self) -> Delta | None:
        """Everything put since the last call, or None; the reader's side."""
        with self._lock:
            delta, self._pending = self._pending, None
        return delta


class BlockingOutbox(Outbox):
    """An outbox for a reader with a thread of its own."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        super().__init__(self._ready.set)

    def __iter__(self) -> Iterator[Delta]:
        """Deltas until the last one; raises nothing of its own (a failed answer is a delta with `error`)."""
        while True:
            self._ready.wait()
            self._ready.clear()
            delta = self.take()
            if delta is not None:
                yield delta
                if delta.last:
                    return
