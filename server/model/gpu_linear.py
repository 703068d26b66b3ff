"""Linear layers whose NF4 weight is read as it lies by our own product."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from server.kernels.gpu import nf4
from server.kernels.gpu.nf4 import Nf4Weight, Workspace
from server.model.coded import CodedLinear


class Nf4Linear(CodedLinear):
    """bitsandbytes' 4-bit layer turned, in place, into one of ours over the same codes; made by `convert` only."""

    packed: Nf4Weight
    workspace: Workspace
    dtype: torch.dtype

    @property
    def codes(self) -> Tensor:
        """See `CodedLinear.codes`."""
        return self.packed.codes

    def unpacked(self, first: int, last: int) -> Tensor:
        """See `CodedLinear.unpacked`. By torch alone: any thread may ask, whatever runs on the device."""
        packed, rows = self.packed, self.packed.codes[first:last]
        codes = torch.stack([rows >> 4, rows & 15], -1).flatten(1).int()
        scales = packed.scales[first:last].float().repeat_interleave(nf4.BLOCK, 1)
        return (packed.levels[codes] * scales).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x w^T + bias; x: [..., in] → [..., out]."""
        rows = x.reshape(-1, self.in_features)
        return nf4.matmul(rows, self.packed, self.workspace, self.bias).view(*x.shape[:-1], self.out_features)


def convertible(linear: Any) -> bool:
    """Whether `convert` can take the layer's weight over: NF4 in blocks of 64 along whole rows, as it was loaded."""
    weight = getattr(linear, "weight", None) if not isinstance(linear, Nf4Linear) else None
    state = getattr(weight, "quant_state", None)
    return (
        isinstance(weight, Tensor)
        and state is not None
        and state.quant_type == "nf4"
        and state.blocksize == nf4.BLOCK
        and linear.in_features % nf4.BLOCK == 0
        and not getattr(state, "packing_format_for_cpu", False)
    )


def convert(model: nn.Module, workspace: Workspace, dtype: torch.dtype) -> None:
    """Take over every convertible layer of the model, in place; the others stay as they are."""
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and convertible(module):
            given = cast(Any, module)
            packed = nf4.from_bitsandbytes(given.weight.data, given.weight.quant_state, dtype)
            become(module, packed, workspace, dtype)


def become(linear: nn.Linear, packed: Nf4Weight, workspace: Workspace, dtype: torch.dtype) -> None:
    """Turn any linear layer of the same shape into one over `packed`."""
    given = cast(Any, linear)
    given._parameters.pop("weight", None)
    given.__class__ = Nf4Linear
    given.packed = packed
    given.workspace = workspace
    given.dtype = dtype
