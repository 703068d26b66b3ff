"""How much of the fault suites runs: a slice by default, everything with LORAPLEX_FAULTS=full.

LORAPLEX_FAULTS=full python -m pytest tests/faults -q
"""

from __future__ import annotations

import os

FULL = os.environ.get("LORAPLEX_FAULTS") == "full"


def times(full: int, slice_: int) -> int:
    """How often a fault is made: `full` times, or a slice of it."""
    return full if FULL else slice_
