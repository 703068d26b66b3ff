"""Linear layers whose bfloat16 weight lies packed for AMX."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from server.kernels.native import amx
from server.kernels.native.amx import PackedWeight


class PackedLinear(nn.Module):
    """x w^T + bias; x: [..., in] → [..., out]."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias
        self.in_features, self.out_features = packed.in_features, packed.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape but for the last dimension."""
        y = self.packed.multiply(x.reshape(-1, self.in_features), self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def packed_linear(linear: nn.Module) -> nn.Module:
    """`linear` with its weight packed, or itself where that cannot be; the dense weight is not kept by it."""
    if type(linear) is not nn.Linear:
        return linear
    packed = amx.pack(linear.weight.data)
    if packed is None:
        return linear
    return PackedLinear(packed, None if linear.bias is None else linear.bias.data)


def pack_output_head(model: nn.Module) -> None:
    """Pack the output head; where it is tied to the embeddings, these keep the dense weight for their look-ups."""
    owner = cast(Any, model)
    head = owner.get_output_embeddings()
    packed = packed_linear(head)
    if packed is not head:
        name = next(name for name, module in model.named_modules() if module is head)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)
