"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def eventually(check: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether `check` comes true. The bound is for a machine with other work: what is right comes true at once."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if check():
            return True
        time.sleep(0.01)
    return check()


def bytes_in(directory: Path, pattern: str) -> int:
    """The sizes of the files there, all together; one that is renamed or removed meanwhile does not count."""
    total = 0
    for path in directory.glob(pattern):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
