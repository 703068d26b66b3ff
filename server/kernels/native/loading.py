"""An adapter's matrices from a file's bytes to the arena's layout in one call that holds no interpreter lock.

With torch it takes some two thousand calls, each of which takes the lock from the step loop for a moment.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.native.library import TYPES, library
from server.kernels.native.structs import I64, POINTER


@dataclass(frozen=True)
class Arrival:
    """to = scale * from, or its transpose."""

    source: Tensor  # [rows, columns] float32 or bfloat16, contiguous, on the CPU
    to: Tensor  # the same shape, or [columns, rows] where `turned`; contiguous, on the CPU
    scale: float = 1.0
    turned: bool = False


class _Arrival(ctypes.Structure):
    _fields_ = [
        ("source", POINTER),
        ("to", POINTER),
        *((name, I64) for name in ("rows", "columns", "turned", "narrow_source")),
        ("scale", ctypes.c_float),
    ]


class _Copy(ctypes.Structure):
    _fields_ = [("source", POINTER), ("to", POINTER), ("bytes", I64)]


def convertible(source: Tensor, dtype: torch.dtype) -> bool:
    """Whether `convert` takes this source for results of `dtype` on this machine."""
    return (
        dtype in TYPES
        and source.dtype in TYPES
        and source.dim() == 2
        and source.is_contiguous()
        and source.device.type == "cpu"
        and library() is not None
    )


def convert(arrivals: Sequence[Arrival]) -> int | None:
    """Do all of them, all to one dtype; each value is multiplied in float32 and rounded once.

    The index of the first whose source holds a NaN or an infinity, with which the work ends, or None.
    """
    if not arrivals:
        return None
    native = library()
    assert native is not None
    run = getattr(native, f"arrive_{TYPES[arrivals[0].to.dtype]}")
    run.restype = I64
    structs = (_Arrival * len(arrivals))(
        *(
            _Arrival(
                each.source.data_ptr(),
                each.to.data_ptr(),
                *each.source.shape,
                int(each.turned),
                int(each.source.dtype == torch.bfloat16),
                each.scale,
            )
            for each in arrivals
        )
    )
    first = int(run(structs, I64(len(arrivals))))
    return None if first < 0 else first


def copy_all(copies: Iterable[tuple[int, int, int]]) -> bool:
    """Copy bytes: (from, to, bytes) addresses, zeros where `from` is 0. False, and nothing done, without a compiler."""
    native = library()
    if native is None:
        return False
    structs = [_Copy(*each) for each in copies]
    native.copy_all((_Copy * len(structs))(*structs), I64(len(structs)))
    return True
