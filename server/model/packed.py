"""Linear layers whose bfloat16 or NF4 weight lies packed for AMX."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from server.kernels.native import amx
from server.kernels.native.amx import PackedNf4, PackedWeight


class PackedLinear(nn.Linear):
    """A linear layer turned, in place, into one whose weight lies packed; made by `pack_linears` only.

    Its `weight` is no parameter any more: reading it unpacks a dense bfloat16 copy.
    """

    packed: PackedWeight | PackedNf4

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in] bfloat16; of NF4 what the codes mean."""
        return self.packed.dense()

    def forward(self, x: Tensor) -> Tensor:
        """x w^T + bias; x: [..., in] → [..., out]."""
        y = self.packed.multiply(x.reshape(-1, self.in_features), self.bias)
        return y.view(*x.shape[:-1], self.out_features)


class JointProduct:
    """Packed layers that share their input, multiplied at once: x [rows, in] → [rows, sum of out]."""

    def __init__(self, packed: PackedWeight | PackedNf4, bias: Tensor | None) -> None:
        self._packed = packed
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """All outputs side by side."""
        return self._packed.multiply(x, self._bias)


def pack_linears(*linears: nn.Module) -> JointProduct | None:
    """Pack the weights of layers that share their input; None, with nothing changed, where that cannot be.

    The layers must be all plain bfloat16 ones or all bitsandbytes' NF4 ones that have not run yet (on some processors
    their first forward reorders the codes). Each goes on working alone, on its part of the one packed weight.
    """
    given = [cast(Any, linear) for linear in linears]
    if any((linear.bias is None) != (given[0].bias is None) for linear in given):
        return None
    packed: PackedWeight | PackedNf4 | None = None
    if all(type(linear) is nn.Linear for linear in linears):
        packed = amx.pack(torch.cat([linear.weight.data for linear in given]))
    elif all(_is_nf4(linear) for linear in linears):
        codes, scales = zip(*(_nf4(linear) for linear in linears), strict=True)
        packed = amx.pack_nf4(torch.cat(codes), torch.cat(scales), given[0].weight.quant_state.code)
    if packed is None or any(linear.out_features % amx.BLOCK for linear in given):
        return None
    at = 0
    for linear in given:
        del linear._parameters["weight"]
        linear.__class__ = PackedLinear
        linear.packed = packed.outputs(at, at + linear.out_features)
        at += linear.out_features
    bias = None if given[0].bias is None else torch.cat([linear.bias.data for linear in given])
    return JointProduct(packed, bias)


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
    head = cast(Any, model).get_output_embeddings()
    if head is not None:
        pack_linears(head)
