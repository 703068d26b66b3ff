"""The tensors of a safetensors file without copying them."""

from __future__ import annotations

import json
import math
import struct
import warnings

import torch
from torch import Tensor

from server.errors import AdapterUnservable

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

with warnings.catch_warnings():
    # torch warns once in a process that what lies in `bytes` must not be written to. Nobody here does.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def tensors_in(data: bytes) -> dict[str, Tensor]:
    """Read-only views into `data`, whose memory they keep; clone what is to stay.

    The hub has looked at the file more strictly; here only what would read elsewhere is refused. Raises
    `AdapterUnservable` for a file that is not well-formed and for numbers that no LoRA has.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > len(data) - 8:
            raise ValueError(f"its header should have {length} bytes, {len(data) - 8} follow")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        return {key: _view(data, 8 + length, key, **slot) for key, slot in header.items()}
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError, struct.error) as error:
        raise AdapterUnservable(f"the weights file cannot be read: {error}") from error


def header_of(data: bytes) -> bytes:
    """The length and the header of a file, as they are; nothing of one that ends before its header does."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[:end] if end <= len(data) else b""


def address_of(data: bytes) -> int:
    """Where the bytes lie."""
    return torch.frombuffer(data, dtype=torch.uint8).data_ptr() if data else 0


def _view(data: bytes, start: int, key: str, dtype: str, shape: list[int], data_offsets: list[int]) -> Tensor:
    numbers = _DTYPES.get(dtype)
    if numbers is None:
        raise AdapterUnservable(f"tensor {key} holds {dtype} numbers; served are {', '.join(_DTYPES)}")
    begin, end = start + data_offsets[0], start + data_offsets[1]
    count = math.prod(shape)
    if not start <= begin <= end <= len(data) or count * numbers.itemsize != end - begin:
        raise ValueError(f"{key} does not lie where the header says")
    if not count:
        return torch.empty(shape, dtype=numbers)
    if begin % numbers.itemsize:
        data, begin = data[begin:end], 0
    return torch.frombuffer(data, dtype=numbers, count=count, offset=begin).view(shape)
