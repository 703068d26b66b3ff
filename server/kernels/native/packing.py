"""Matrix products with weights packed once: at 16 rows of bfloat16 about twice torch's speed where there is AMX, at one
row limited by memory, and a row's result never depends on its company."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from server.kernels.native.library import TYPES, library
from server.kernels.native.structs import I64, Product, pointer

PANEL = 32
TILE_ROWS = 16


class PackedWeight:
    """A weight [out, in] in panels of 32 outputs; takes the memory of the weight it is made of."""

    def __init__(self, native: ctypes.CDLL, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        panels = -(-self.out_features // PANEL)
        self._packed = torch.empty(panels, PANEL * self.in_features, dtype=weight.dtype)
        self._rows = getattr(native, f"packed_rows_{TYPES[weight.dtype]}")
        contiguous = weight.contiguous()
        getattr(native, f"pack_{TYPES[weight.dtype]}")(
            pointer(contiguous), pointer(self._packed), I64(self.out_features), I64(self.in_features)
        )

    def product(self, bias: Tensor | None) -> Product:
        """As the C code wants it; `bias` [out] float32. Both must be kept alive."""
        return Product(self.out_features, self.in_features, self._packed.data_ptr(), None, None, pointer(bias))

    def dense(self) -> Tensor:
        """The weight [out, in] again."""
        panels = self._packed.shape[0]
        if self.dtype == torch.float32:
            weight = self._packed.view(panels, self.in_features, PANEL).transpose(1, 2)
        else:
            weight = self._packed.view(panels, self.in_features // 32, 2, 16, 16, 2).permute(0, 2, 4, 1, 3, 5)
        return weight.reshape(-1, self.in_features)[: self.out_features]

    def rows(self, outputs: Tensor) -> Tensor:
        """`dense()[outputs]` without unpacking the rest; outputs: [n] int64 → [n, in]. Raises IndexError."""
        if outputs.numel() and not 0 <= int(outputs.min()) <= int(outputs.max()) < self.out_features:
            raise IndexError(f"a row below 0 or above {self.out_features - 1} was asked for")
        rows = torch.empty(outputs.numel(), self.in_features, dtype=self.dtype)
        count, width = I64(outputs.numel()), I64(self.in_features)
        self._rows(pointer(self._packed), pointer(outputs.contiguous()), pointer(rows), count, width)
        return rows


class PackedNf4:
    """A weight [out, in] in bitsandbytes' NF4, its codes in panels: half a byte a weight is all a step reads."""

    dtype = torch.bfloat16

    def __init__(self, codes: Tensor, scales: Tensor, levels: Tensor) -> None:
        """codes: [out, in] uint8 below 16; scales: [out, in / 64] float32; levels: [16] float32."""
        self.out_features, self.in_features = codes.shape
        panels, steps = -(-self.out_features // PANEL), self.in_features // 32
        missing = panels * PANEL - self.out_features
        codes = torch.nn.functional.pad(codes, (0, 0, 0, missing))
        scales = torch.nn.functional.pad(scales, (0, 0, 0, missing))
        tiles = codes.view(panels, 2, 16, steps, 16, 2).permute(0, 3, 1, 4, 2, 5)
        self._codes = (tiles[..., 0] | tiles[..., 1] << 4).contiguous()
        self._scales = scales.view(panels, 2, 16, steps // 2).permute(0, 3, 1, 2).contiguous()
        self._levels = levels.float().contiguous()

    def product(self, bias: Tensor | None) -> Product:
        """As the C code wants it; `bias` [out] float32. Both must be kept alive."""
        return Product(
            self.out_features,
            self.in_features,
            *(t.data_ptr() for t in (self._codes, self._scales, self._levels)),
            pointer(bias),
        )

    def dense(self) -> Tensor:
        """[out, in] bfloat16: what the codes mean."""
        codes = torch.stack([self._codes & 15, self._codes >> 4], -1)  # [panels, steps, 2, 16 pairs, 16 outputs, 2]
        values = self._levels[codes.long()] * self._scales.repeat_interleave(2, 1)[:, :, :, None, :, None]
        weight = values.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.in_features).bfloat16()
        return weight[: self.out_features]


Packed = PackedWeight | PackedNf4


class PackedProduct:
    """x w^T + bias for up to three packed weights of one input."""

    def __init__(self, packed: Sequence[Packed], biases: Sequence[Tensor | None]) -> None:
        native = library()
        if native is None:
            raise AssertionError("packed weights without the library that packed them")
        self._alive = (tuple(packed), [None if bias is None else bias.float().contiguous() for bias in biases])
        self._dtype = packed[0].dtype
        # Elements a thread needs to widen a panel.
        self.wide = max((p.in_features for p in packed if isinstance(p, PackedNf4)), default=0) * PANEL
        self._multiply = getattr(native, f"multiply_{TYPES[self._dtype]}")
        products = [p.product(bias) for p, bias in zip(packed, self._alive[1], strict=True)]
        self.products = (Product * len(products))(*products)
        self.out_features = sum(p.out_features for p in packed)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [rows, in] → [rows, sum of out], summed in float32, rounded once."""
        rows = x.shape[0]
        x = _whole_tiles(x)
        y = torch.empty(rows, self.out_features, dtype=self._dtype)
        buffer = torch.empty(torch.get_num_threads() * self.wide, dtype=self._dtype)
        self._multiply(
            self.products, I64(len(self.products)), pointer(x), pointer(y), I64(rows), I64(y.shape[1]), pointer(buffer)
        )
        return y


def _whole_tiles(x: Tensor) -> Tensor:
    """x [rows, in] with rows of zeros up to a whole tile."""
    rows = x.shape[0]
    if rows % TILE_ROWS == 0 or x.dtype != torch.bfloat16:
        return x.contiguous()
    padded = torch.zeros(-(-rows // TILE_ROWS) * TILE_ROWS, x.shape[1], dtype=x.dtype)
    padded[:rows] = x
    return padded


def pack_nf4(codes: Tensor, scales: Tensor, levels: Tensor) -> PackedNf4 | None:
    """NF4 codes [out, in], scales [out, in / 64] and the 16 levels packed, or None where `pack` would say None."""
    if library() is None or codes.shape[1] % 64 or codes.device.type != "cpu":
        return None
    return PackedNf4(codes, scales, levels)


def pack(weight: Tensor) -> PackedWeight | None:
    """`weight` [out, in] packed, or None: neither bfloat16 with in % 32 == 0 nor float32, no CPU, no compiler."""
    if weight.dtype not in TYPES or weight.device.type != "cpu":
        return None
    if weight.dtype == torch.bfloat16 and weight.shape[1] % 32:
        return None
    native = library()
    return PackedWeight(native, weight) if native is not None else None
