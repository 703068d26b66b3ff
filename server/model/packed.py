"""Linear layers whose weight lies packed for the native matrix product."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from server.kernels.native import packing
from server.kernels.native.library import library
from server.kernels.native.packing import Packed, PackedProduct, PackedWeight


class PackedLinear(nn.Linear):
    """A linear layer turned, in place, into one whose weight lies packed; made by `pack_linear` only.

    Its `weight` is no parameter any more: reading it unpacks a dense copy.
    """

    packed: Packed
    product: PackedProduct

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[out, in]; of NF4 what the codes mean, in bfloat16."""
        return self.packed.dense()

    def forward(self, x: Tensor) -> Tensor:
        """x w^T + bias; x: [..., in] → [..., out]."""
        return self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)


class PackedEmbedding(nn.Embedding):
    """An embedding, turned in place, that looks its rows up in the packed weight of the output head it is tied to."""

    packed: PackedWeight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[vocabulary, hidden]."""
        return self.packed.dense()

    def forward(self, input: Tensor) -> Tensor:
        """Token ids [...] → [..., hidden]."""
        return self.packed.rows(input.reshape(-1)).view(*input.shape, self.embedding_dim)


def packable(linear: nn.Module) -> bool:
    """Whether `pack_linear` can do something: a plain layer or bitsandbytes' NF4 one that has not run yet (on some
    processors its first forward reorders the codes)."""
    if library() is None:
        return False
    if type(linear) is nn.Linear:
        weight = linear.weight
        fits = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and linear.in_features % 32 == 0)
        return fits and weight.device.type == "cpu"
    return isinstance(linear, PackedLinear) or _is_nf4(linear)


def pack_linear(linear: nn.Module) -> bool:
    """Pack the weight in place; False, with nothing changed, where that cannot be."""
    if not packable(linear):
        return False
    if isinstance(linear, PackedLinear):
        return True
    given = cast(Any, linear)
    if type(linear) is nn.Linear:
        packed: Packed | None = packing.pack(given.weight.data)
    else:
        packed = packing.pack_nf4(*_nf4(given), given.weight.quant_state.code)
    if packed is None:
        raise AssertionError("a packable layer was not packed")
    del given._parameters["weight"]
    given.__class__ = PackedLinear
    given.packed = packed
    given.product = PackedProduct([packed], [None if given.bias is None else given.bias.data])
    return True


def _is_nf4(linear: Any) -> bool:
    weight = getattr(linear, "weight", None)
    state = getattr(weight, "quant_state", None)
    return (
        isinstance(weight, Tensor)
        and weight.device.type == "cpu"
        and state is not None
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
    """Pack the output head; embeddings tied to it, where they are plain ones, then read their rows from it."""
    given = cast(Any, model)
    head, embedding = given.get_output_embeddings(), given.get_input_embeddings()
    if head is None or embedding is None:
        return
    tied = head.weight is embedding.weight
    if not pack_linear(head) or not tied or type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return
    del embedding._parameters["weight"]
    embedding.__class__ = PackedEmbedding
    embedding.packed = head.packed


def let_go_of_checkpoint(model: nn.Module) -> None:
    """Copy what was not packed out of the file it was read from.

    A checkpoint stays mapped, and counts as memory, as long as one tensor points into it; packed weights too came from
    there.
    """
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if type(tensor) in (nn.Parameter, Tensor) and tensor is not None and tensor.device.type == "cpu":
                    tensor.data = tensor.data.clone()
