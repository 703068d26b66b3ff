"""What a long experiment says of itself: how long things take, and what machine it runs on."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from pathlib import Path


def duration(seconds: float) -> str:
    """As people say it: "45 s", "12 min", "1.5 h"."""
    minutes = seconds / 60
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def machine(threads: Collection[int], each: str = "a cell", processors: Collection[str] = ()) -> str:
    """A sentence or two; `threads` are what one of `each` or another has used, 0 all, `processors` where they ran."""
    used = sorted({count or len(os.sched_getaffinity(0)) for count in threads})
    counts = f"{' or '.join(map(str, used))} thread{'s' if used != [1] else ''} {each}, " if used else ""
    named = f" Processor: {' or '.join(sorted(set(processors)))}." if processors else ""
    return f"Machine: {platform.machine()}, {os.cpu_count()} cores, {counts}Python {platform.python_version()}.{named}"


def processor() -> str:
    """The processor's name, as its maker has it where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
