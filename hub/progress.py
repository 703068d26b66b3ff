"""How long work tells of itself."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done ("hashing the base"), bytes done, bytes in all
