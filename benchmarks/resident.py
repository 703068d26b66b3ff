"""How much of this process's memory really lies in RAM: by process, by mapped file, by tensor (Linux only)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

_PAGE = os.sysconf("SC_PAGE_SIZE")
_ENTRY = 8  # bytes of one page's entry in /proc/self/pagemap
_PRESENT = 1 << 63


def status(field: str) -> int:
    """Bytes of one line of /proc/self/status: VmRSS, VmHWM, RssAnon, RssFile."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise KeyError(field)


def reset_peak() -> None:
    """Let VmHWM begin anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def mapped_files() -> dict[str, int]:
    """Resident bytes of every file that is mapped, by path."""
    found: dict[str, int] = {}
    path = ""
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            path = words[5] if len(words) > 5 and words[5].startswith("/") else ""
        elif words[0] == "Rss:" and path:
            found[path] = found.get(path, 0) + int(words[1]) * 1024
    return found


@dataclass(frozen=True)
class Held:
    """What some tensors take."""

    bytes: int  # allocated, each storage once
    resident: int  # of those in RAM: memory never touched takes none


class Ledger:
    """Tensors by owner; a storage counts for the owner that claims it first."""

    def __init__(self) -> None:
        self._claimed: set[int] = set()

    def claim(self, tensors: Iterable[Tensor]) -> Held:
        """The storages of `tensors` that nobody has claimed."""
        total = resident = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if not storage.nbytes() or storage.data_ptr() in self._claimed:
                continue
            self._claimed.add(storage.data_ptr())
            total += storage.nbytes()
            resident += in_ram(storage.data_ptr(), storage.nbytes())
        return Held(total, resident)


def in_ram(address: int, size: int) -> int:
    """How many of `size` bytes from `address` on lie in pages that are present."""
    first, last = address // _PAGE, (address + size - 1) // _PAGE
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(first * _ENTRY)
        entries = pagemap.read((last - first + 1) * _ENTRY)
    count = 0
    for page in range(first, last + 1):
        at = (page - first) * _ENTRY
        if int.from_bytes(entries[at : at + _ENTRY], "little") & _PRESENT:
            start, end = max(page * _PAGE, address), min((page + 1) * _PAGE, address + size)
            count += end - start
    return count


def tensors_in(value: object, depth: int = 3) -> list[Tensor]:
    """Tensors among an object's attributes and what these hold, `depth` levels down."""
    if isinstance(value, Tensor):
        return [value]
    if depth == 0:
        return []
    inner: Iterable[object] = ()
    if isinstance(value, Mapping):
        inner = value.values()
    elif isinstance(value, list | tuple):
        inner = value
    elif hasattr(value, "__dict__"):
        inner = vars(value).values()
    return [tensor for each in inner for tensor in tensors_in(each, depth - 1)]
