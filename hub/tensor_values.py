"""Looks at the numbers of a tensor: finite, and of a size that training can produce."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hub.errors import DtypeUnsupported, NonFinite, NormAbsurd
from hub.safetensors_file import TensorSlot

# Trained LoRA factors have elements below 10 and norms below 100; full embeddings reach norms of some thousands.
MAX_ELEMENT: Final = 1e5
MAX_NORM: Final = 1e6
MAX_DELTA_NORM: Final = 1e6  # of scaling · ‖A‖ · ‖B‖, a bound on the norm of what an adapter adds to one weight
_CHUNK_BYTES = 256 * 1024  # with its copies inside a core's cache
_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class TensorValues:
    """Summary of one tensor's numbers."""

    norm: float  # Frobenius
    largest: float  # largest absolute value


def look_at(name: str, slot: TensorSlot, data: memoryview) -> TensorValues:
    """The summary of the tensor `name` whose raw bytes are `data`.

    Raises DtypeUnsupported, NonFinite where an element is NaN or infinite, NormAbsurd above MAX_ELEMENT or MAX_NORM.
    """
    if slot.dtype not in _NUMPY_DTYPES:
        raise DtypeUnsupported(f"the tensor {name} is of type {slot.dtype}; adapters are F64, F32, F16 or BF16")
    largest, squares = 0.0, 0.0
    for begin in range(0, len(data), _CHUNK_BYTES):
        values = as_floats(slot.dtype, data[begin : begin + _CHUNK_BYTES])
        with np.errstate(all="ignore"):
            peak = float(np.max(np.abs(values)))  # NaN where any element is NaN
        if not math.isfinite(peak):
            raise NonFinite(f"the tensor {name} holds NaN or infinite values")
        if peak > MAX_ELEMENT:
            raise NormAbsurd(f"the tensor {name} holds values up to {peak:.3g}; at most {MAX_ELEMENT:g} are taken")
        largest = max(largest, peak)
        doubles = values.astype(np.float64)
        # Not np.dot: BLAS shares even this out among threads, which wait for each other spinning.
        squares += float(np.einsum("i,i->", doubles, doubles))
    norm = math.sqrt(squares)
    if norm > MAX_NORM:
        raise NormAbsurd(f"the tensor {name} has the norm {norm:.3g}; at most {MAX_NORM:g} is taken")
    return TensorValues(norm, largest)


def as_floats(dtype: str, data: memoryview) -> np.ndarray[Any, np.dtype[Any]]:
    """Raw bytes of a tensor of the safetensors type `dtype` (F64, F32, F16 or BF16) as a flat array."""
    values = np.frombuffer(data, dtype=_NUMPY_DTYPES[dtype])
    # numpy knows no bfloat16: it is the upper half of a float32.
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values
