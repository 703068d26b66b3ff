"""An adapter's matrices from a file's bytes to the arena's layout in one call that holds no interpreter lock.

With torch it takes some two thousand calls, each of which takes the lock from the step loop for a moment.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
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


# `arrival` of loading.c.
_ARRIVAL = np.dtype(
    [*((name, "i8") for name in ("source", "to", "rows", "columns", "turned", "narrow_source")), ("scale", "f4")],
    align=True,
)


class _Copy(ctypes.Structure):
    _fields_ = [("source", POINTER), ("to", POINTER), ("bytes", I64)]


def convertible(source: Tensor, dtype: torch.dtype) -> bool:
    """Whether `Arrivals` takes this source for results of `dtype` on this machine."""
    return (
        dtype in TYPES
        and source.dtype in TYPES
        and source.dim() == 2
        and source.is_contiguous()
        and source.device.type == "cpu"
        and library() is not None
    )


class Arrivals:
    """All matrices of an adapter, to one dtype. What differs from one adapter to the next of the same layout is where
    the file and the result lie, so the rest is written down once."""

    def __init__(self, arrivals: Sequence[Arrival], source: int = 0, to: int = 0) -> None:
        """`source` and `to`: addresses from which theirs are counted. All must be `convertible`."""
        self._dtype = arrivals[0].to.dtype if arrivals else torch.float32
        self._structs = np.array(
            [
                (
                    each.source.data_ptr() - source,
                    each.to.data_ptr() - to,
                    *each.source.shape,
                    each.turned,
                    each.source.dtype == torch.bfloat16,
                    each.scale,
                )
                for each in arrivals
            ],
            _ARRIVAL,
        )

    def convert(self, source: int = 0, to: int = 0) -> int | None:
        """Do all of them, counted from these addresses; each value is multiplied in float32 and rounded once.

        The index of the first whose source holds a NaN or an infinity, with which the work ends, or None.
        """
        if not len(self._structs):
            return None
        native = library()
        assert native is not None
        run = getattr(native, f"arrive_{TYPES[self._dtype]}")
        run.restype = I64
        structs = self._structs.copy()
        structs["source"] += source
        structs["to"] += to
        first = int(run(POINTER(structs.ctypes.data), I64(len(structs))))
        return None if first < 0 else first


def copy_all(copies: Iterable[tuple[int, int, int]]) -> bool:
    """Copy bytes: (from, to, bytes) addresses, zeros where `from` is 0. False, and nothing done, without a compiler."""
    native = library()
    if native is None:
        return False
    structs = [_Copy(*each) for each in copies]
    native.copy_all((_Copy * len(structs))(*structs), I64(len(structs)))
    return True
