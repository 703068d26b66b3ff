"""How much memory this process may still take, so that a plan is refused before the kernel kills the process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the machine has left, or the control groups of this process if that is less; None: nobody says.

    `root` is where /proc and /sys lie.
    """
    left = [*_machine(root), *_groups(root)]
    return max(min(left), 0) if left else None


def _machine(root: Path) -> Iterator[int]:
    match = re.search(r"^MemAvailable:\s+([0-9]+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if match is not None:
        yield int(match[1]) * 1024


def _groups(root: Path) -> Iterator[int]:
    """What is left of the limit of every group that this process is in, version 2 and 1."""
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = ("memory.max", "memory.current", "inactive_file")
        mount = mounts
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = mounts / "memory"
        group = mount / path.lstrip("/")
        # In a container the path may be the host's, which is not to be seen there: its own group is at the root then.
        for place in (group, *group.parents):
            if place.is_relative_to(mount):
                yield from _left(place, *names)


def _left(group: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    most, used = _text(group / limit).strip(), _text(group / usage).strip()
    if most.isdecimal() and used.isdecimal():  # "max" is no limit
        # Files that nobody has read for a while count as used, and give way.
        match = re.search(rf"^{cache} ([0-9]+)$", _text(group / "memory.stat"), re.MULTILINE)
        yield int(most) - int(used) + (int(match[1]) if match else 0)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
