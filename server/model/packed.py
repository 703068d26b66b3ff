"""Linear layers whose bfloat16 or NF4 weight lies packed for AMX."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from server.kernels.native import amx
from server.kernels.native.amx import PackedNf4, PackedWeight


class PackedLinear(nn.Module):
    """x w^T + bias; x: [..., in] → [..., out]."""

    def __init__(self, packed: PackedWeight | PackedNf4, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = bias
        self.in_features, self.out_features = packed.in_features, packed.out_features

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape but for the last dimension."""
        y = self.packed.multiply(x.reshape(-1, self.in_features), self.bias)
        return y.view(*x.shape[:-1], self.out_features)


def packed_linear(*linears: nn.Module) -> PackedLinear | None:
    """Layers that share their input as one with its weight packed; None where they cannot be.

    The layers must be all plain bfloat16 ones or all bitsandbytes' NF4 ones that have not run yet (on some processors
    their first forward reorders the codes). Their own weights are not kept.
    """
    biases = [cast(Any, linear).bias for linear in linears]
    bias = None if any(b is None for b in biases) else torch.cat([b.data for b in biases])
    if bias is None and any(b is not None for b in biases):
        return None
    packed: PackedWeight | PackedNf4 | None = None
    if all(type(linear) is nn.Linear for linear in linears):
        packed = amx.pack(torch.cat([cast(nn.Linear, linear).weight.data for linear in linears]))
    elif all(_is_nf4(linear) for linear in linears):
        codes, scales = zip(*(_nf4(linear) for linear in linears), strict=True)
        packed = amx.pack_nf4(torch.cat(codes), torch.cat(scales), cast(Any, linears[0]).weight.quant_state.code)
    return PackedLinear(packed, bias) if packed is not None else None


def _is_nf4(linear: Any) -> bool:
    state = getattr(getattr(linear, "weight", None), "quant_state", None)
    return (
        state is not None
        and state.quant_type == "nf4"
        and state.blocksize == 64
        and state.dtype == torch.bfloat16
        and not getattr(state, "packing_format_for_cpu", False)
        and linear.in_features % 64 == 0
    )


def _nf4(linear: Any) -> tuple[Tensor, Tensor]:
    """Codes [out, in] below 16 and scales [out, in / 64] of what bitsandbytes holds (first of a pair high)."""
    from bitsandbytes.functional import dequantize_blockwise

    state, shape = linear.weight.quant_state, (linear.out_features, linear.in_features)
    packed = linear.weight.data.view(torch.uint8).reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(shape)
    scales = state.absmax
    if state.nested:
        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return codes, scales.float().view(shape[0], -1)


def pack_output_head(model: nn.Module) -> None:
    """Pack the output head; where it is tied to the embeddings, these keep the dense weight for their look-ups."""
    owner = cast(Any, model)
    head = owner.get_output_embeddings()
    packed = packed_linear(head)
    if packed is not None:
        name = next(name for name, module in model.named_modules() if module is head)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)
