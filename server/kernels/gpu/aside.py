"""Work on the device beside the steps: on a stream of its own, finished before anybody hears of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

Aside = Callable[[], AbstractContextManager[None]]
"""Opens a stretch of work beside the steps; when it closes, the device has done the work."""


class SideStream:
    """One thread's stream on a GPU."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Launches inside go to the stream; leaving waits for them, and keeps neither the steps nor Python's lock."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
            done = torch.cuda.Event()
            done.record()
        done.synchronize()


def in_line() -> AbstractContextManager[None]:
    """Where there is no device to run beside: at once."""
    return contextlib.nullcontext()
