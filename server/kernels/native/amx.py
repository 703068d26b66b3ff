"""Matrix products with bfloat16 weights packed once for AMX tiles: at 16 rows about twice torch's speed, at one row
limited by memory, and a row's result never depends on its company."""

from __future__ import annotations

import ctypes
import functools
import sys

import torch
from torch import Tensor

from server.kernels.native.build import build, processor_flags

BLOCK = 32  # inputs and outputs must be whole blocks
_TILE_ROWS = 16


class PackedWeight:
    """A weight [out, in] in tile order; takes the same memory as the weight it is made of."""

    def __init__(self, library: ctypes.CDLL, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._packed = torch.empty_like(weight, memory_format=torch.contiguous_format)
        self._gemm = library.amx_gemm
        contiguous = weight.contiguous()
        library.amx_pack(
            ctypes.c_void_p(contiguous.data_ptr()),
            ctypes.c_void_p(self._packed.data_ptr()),
            ctypes.c_int64(self.out_features),
            ctypes.c_int64(self.in_features),
        )

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x w^T + bias, summed in float32, rounded once; x: [rows, in] bfloat16 → [rows, out]."""
        rows = x.shape[0]
        y = torch.empty(rows, self.out_features, dtype=torch.bfloat16)
        if rows % _TILE_ROWS or not x.is_contiguous():
            padded = torch.zeros(-(-rows // _TILE_ROWS) * _TILE_ROWS, self.in_features, dtype=torch.bfloat16)
            padded[:rows] = x
            x = padded
        self._gemm(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(self._packed.data_ptr()),
            ctypes.c_void_p(bias.data_ptr() if bias is not None else 0),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int64(rows),
            ctypes.c_int64(self.out_features),
            ctypes.c_int64(self.in_features),
            ctypes.c_int64(self.out_features),
        )
        return y

    def dense(self) -> Tensor:
        """The weight [out, in] again."""
        blocks = self._packed.view(self.out_features // BLOCK, self.in_features // BLOCK, 2, 16, 16, 2)
        return blocks.permute(0, 2, 4, 1, 3, 5).reshape(self.out_features, self.in_features)


def pack(weight: Tensor) -> PackedWeight | None:
    """`weight` [out, in] packed, or None: not bfloat16 on the CPU, not whole blocks, no AMX, no compiler."""
    out_features, in_features = weight.shape
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or out_features % BLOCK or in_features % BLOCK:
        return None
    library = _library()
    return PackedWeight(library, weight) if library is not None else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux") or not {"amx_bf16", "amx_tile"} <= processor_flags():
        return None
    library = build("gemm_amx.c", (), ("-mamx-tile", "-mamx-bf16"))
    if library is None or library.amx_request() != 0:
        return None
    library.amx_gemm.restype = library.amx_pack.restype = None
    return library
