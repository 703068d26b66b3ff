"""Matrix products with bfloat16 weights packed once for AMX tiles: at 16 rows about twice torch's speed, at one row
limited by memory, and a row's result never depends on its company."""

from __future__ import annotations

import copy
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
            _pointer(contiguous),
            _pointer(self._packed),
            ctypes.c_int64(self.out_features),
            ctypes.c_int64(self.in_features),
        )

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x w^T + bias, summed in float32, rounded once; x: [rows, in] bfloat16 → [rows, out]."""
        rows = x.shape[0]
        x = _whole_tiles(x)
        y = torch.empty(rows, self.out_features, dtype=torch.bfloat16)
        self._gemm(
            *(_pointer(t) for t in (x, self._packed, bias, y)),
            *(ctypes.c_int64(size) for size in (rows, self.out_features, self.in_features, self.out_features)),
        )
        return y

    def outputs(self, first: int, last: int) -> PackedWeight:
        """The weight of outputs first…last alone, whole blocks; shares the memory."""
        part = copy.copy(self)
        part.out_features = last - first
        part._packed = self._packed[first:last]
        return part

    def dense(self) -> Tensor:
        """The weight [out, in] again."""
        blocks = self._packed.view(self.out_features // BLOCK, self.in_features // BLOCK, 2, 16, 16, 2)
        return blocks.permute(0, 2, 4, 1, 3, 5).reshape(self.out_features, self.in_features)


class PackedNf4:
    """A weight [out, in] in bitsandbytes' NF4, its codes in tile order: half a byte a weight is all a step reads."""

    def __init__(self, library: ctypes.CDLL, codes: Tensor, scales: Tensor, levels: Tensor) -> None:
        """codes: [out, in] uint8 below 16; scales: [out, in / 64] float32; levels: [16] float32."""
        self.out_features, self.in_features = codes.shape
        blocks, steps = self.out_features // BLOCK, self.in_features // BLOCK
        tiles = codes.view(blocks, 2, 16, steps, 16, 2).permute(0, 3, 1, 4, 2, 5)
        self._codes = (tiles[..., 0] | tiles[..., 1] << 4).contiguous()
        self._scales = scales.view(blocks, 2, 16, steps // 2).permute(0, 3, 1, 2).contiguous()
        self._levels = levels.contiguous()
        self._gemm = library.amx_gemm_nf4

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x w^T + bias with w rounded to bfloat16, summed in float32; x: [rows, in] bfloat16 → [rows, out]."""
        rows = x.shape[0]
        x = _whole_tiles(x)
        y = torch.empty(rows, self.out_features, dtype=torch.bfloat16)
        buffer = torch.empty(torch.get_num_threads() * BLOCK * self.in_features, dtype=torch.bfloat16)
        self._gemm(
            *(_pointer(t) for t in (x, self._codes, self._scales, self._levels, bias, y)),
            *(ctypes.c_int64(size) for size in (rows, self.out_features, self.in_features, self.out_features)),
            _pointer(buffer),
        )
        return y

    def outputs(self, first: int, last: int) -> PackedNf4:
        """The weight of outputs first…last alone, whole blocks; shares the memory."""
        part = copy.copy(self)
        part.out_features = last - first
        part._codes = self._codes[first // BLOCK : last // BLOCK]
        part._scales = self._scales[first // BLOCK : last // BLOCK]
        return part

    def dense(self) -> Tensor:
        """[out, in] bfloat16: what the codes mean."""
        codes = torch.stack([self._codes & 15, self._codes >> 4], -1)  # [blocks, steps, 2, 16 pairs, 16 outputs, 2]
        values = self._levels[codes.long()] * self._scales.repeat_interleave(2, 1)[:, :, :, None, :, None]
        return values.permute(0, 2, 4, 1, 3, 5).reshape(self.out_features, self.in_features).bfloat16()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


def _whole_tiles(x: Tensor) -> Tensor:
    """x [rows, in] with rows of zeros up to a whole tile."""
    rows = x.shape[0]
    if rows % _TILE_ROWS == 0:
        return x.contiguous()
    padded = torch.zeros(-(-rows // _TILE_ROWS) * _TILE_ROWS, x.shape[1], dtype=x.dtype)
    padded[:rows] = x
    return padded


def pack_nf4(codes: Tensor, scales: Tensor, levels: Tensor) -> PackedNf4 | None:
    """NF4 codes [out, in], scales [out, in / 64] and the 16 levels packed, or None where `pack` would say None."""
    out_features, in_features = codes.shape
    library = _library()
    if library is None or out_features % BLOCK or in_features % (2 * BLOCK) or codes.device.type != "cpu":
        return None
    return PackedNf4(library, codes, scales, levels)


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
    for function in (library.amx_gemm, library.amx_gemm_nf4, library.amx_pack):
        function.restype = None
    return library
