"""How much memory this process may take, so that a plan is refused before the kernel kills the process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that the machine has left, or the control groups of this process if that is less; None: nobody says.

    `root` is where /proc and /sys lie.
    """
    left = [*_machine(root), *(group.left for group in _groups(root) if group.left is not None)]
    return max(min(left), 0) if left else None


def whole_memory(root: Path = Path("/")) -> int:
    """Bytes that the machine has, or what a control group of this process is limited to if that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *(group.most for group in _groups(root) if group.most is not None)])


def _machine(root: Path) -> Iterator[int]:
    match = re.search(r"^MemAvailable:\s+([0-9]+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if match is not None:
        yield int(match[1]) * 1024


@dataclass(frozen=True)
class _Group:
    """A control group that this process is in, and the names of its files, which differ between versions 2 and 1."""

    directory: Path
    limit: str = "memory.max"
    usage: str = "memory.current"
    cache: str = "inactive_file"

    @property
    def most(self) -> int | None:
        """Bytes that its processes may have together; None: no limit."""
        return _number(self.directory / self.limit)

    @property
    def left(self) -> int | None:
        """Bytes of that which they do not have."""
        most, used = self.most, _number(self.directory / self.usage)
        if most is None or used is None:
            return None
        # Files that nobody has read for a while count as used, and give way.
        match = re.search(rf"^{self.cache} ([0-9]+)$", _text(self.directory / "memory.stat"), re.MULTILINE)
        return most - used + (int(match[1]) if match else 0)


def _groups(root: Path) -> Iterator[_Group]:
    mounts = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names: tuple[str, ...] = ()
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
                yield _Group(place, *names)


def _number(file: Path) -> int | None:
    text = _text(file).strip()
    return int(text) if text.isdecimal() else None  # "max" is no limit


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
