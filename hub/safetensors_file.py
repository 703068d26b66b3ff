"""The safetensors format, read strictly and without torch.

    file   = u64 little-endian header length N, N bytes of JSON, data
    header = {"__metadata__": {text: text}?, name: {"dtype": …, "shape": […], "data_offsets": [begin, end]}, …}

The tensors' ranges must tile the data exactly: no holes, no overlaps, nothing left over.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hub import json_text
from hub.errors import SafetensorsMalformed

MAX_HEADER_BYTES: Final = 32 * 1024 * 1024
MAX_TENSORS: Final = 262_144
MAX_DIMENSIONS: Final = 8
# Bits of one element, by the format's names.
_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor lies: bytes [begin, end) of the file."""

    dtype: str  # the format's name, "BF16"
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class MappedTensors:
    """A safetensors file mapped into memory; valid inside `mapped`."""

    slots: Mapping[str, TensorSlot]  # in the order of the data
    data: memoryview  # the whole file

    def bytes_of(self, name: str) -> memoryview:
        """The raw bytes of one tensor."""
        slot = self.slots[name]
        return self.data[slot.begin : slot.end]


@contextmanager
def mapped(path: Path) -> Iterator[MappedTensors]:
    """`path` mapped and its header checked; raises SafetensorsMalformed, or OSError if it cannot be read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise SafetensorsMalformed(f"{path.name} has {size} bytes, a safetensors file has at least 8")
        # Closed by the collector, not here: an error on its way out may still hold a view of the data.
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        yield MappedTensors(read_header(view, path.name), view)


def read_header(data: memoryview, name: str) -> dict[str, TensorSlot]:
    """The tensors of the safetensors file whose bytes are `data`, ordered by offset.

    `name` is what messages call the file. Raises SafetensorsMalformed.
    """
    if len(data) < 8:
        raise SafetensorsMalformed(f"{name} has {len(data)} bytes, a safetensors file has at least 8")
    (length,) = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER_BYTES:
        raise SafetensorsMalformed(f"{name} says its header has {length} bytes; at most {MAX_HEADER_BYTES} are taken")
    start = 8 + length
    if start > len(data):
        raise SafetensorsMalformed(f"{name} says its header has {length} bytes, but only {len(data) - 8} follow")
    if bytes(data[8:9]) != b"{":
        raise SafetensorsMalformed(f"{name}: the header does not begin with an object")
    try:
        header = json_text.parse_object(bytes(data[8:start]), max_bytes=MAX_HEADER_BYTES)
    except ValueError as error:
        raise SafetensorsMalformed(f"{name}: the header {error}") from error
    _check_metadata(header.pop("__metadata__", {}), name)
    if len(header) > MAX_TENSORS:
        raise SafetensorsMalformed(f"{name} has {len(header)} tensors; at most {MAX_TENSORS} are taken")
    slots = {key: _slot(key, entry, start, len(data), name) for key, entry in header.items()}
    ordered = dict(sorted(slots.items(), key=lambda item: (item[1].begin, item[1].end)))
    _check_tiling(ordered, start, len(data), name)
    return ordered


def _check_metadata(metadata: Any, name: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SafetensorsMalformed(f"{name}: __metadata__ is not an object of text")


def _slot(key: str, entry: Any, start: int, size: int, name: str) -> TensorSlot:
    shown = ascii(key if len(key) <= 160 else key[:157] + "...")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SafetensorsMalformed(f"{name}: the entry of {shown} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise SafetensorsMalformed(f"{name}: {shown} has an unknown dtype")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_length, shape)):
        raise SafetensorsMalformed(f"{name}: {shown} has no valid shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_length, offsets)):
        raise SafetensorsMalformed(f"{name}: {shown} has no valid data_offsets")
    begin, end = start + offsets[0], start + offsets[1]
    if not begin <= end <= size:
        raise SafetensorsMalformed(f"{name}: {shown} lies outside the file (cut short?)")
    # Python integers do not overflow, so a product that would wrap in 64 bits simply does not match.
    if math.prod(shape) * _BITS[dtype] != (end - begin) * 8:
        raise SafetensorsMalformed(f"{name}: {shown} has {end - begin} bytes, its shape and dtype need another number")
    return TensorSlot(dtype, tuple(shape), begin, end)


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_tiling(ordered: Mapping[str, TensorSlot], start: int, size: int, name: str) -> None:
    position = start
    for key, slot in ordered.items():
        if slot.begin != position:
            what = "overlaps the tensor before it" if slot.begin < position else "leaves a hole before it"
            raise SafetensorsMalformed(f"{name}: {ascii(key[:160])} {what}")  # noqa: RUF010 - cut, then escaped
        position = slot.end
    if position != size:
        raise SafetensorsMalformed(f"{name} has {size - position} bytes that belong to no tensor")
