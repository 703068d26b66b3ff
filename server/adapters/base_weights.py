"""The base's modules as adapters see them: found by path, their weights readable whatever they are stored in.

Taken before the linears are wrapped; it holds references, no copies. Where a linear's weight gets packed later, reading
it here unpacks it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from server.adapters.kv_reach import behind_kv
from server.errors import UnsupportedAdapter
from server.model.coded import CodedLinear
from server.model.packed import PackedLinear

_AT_ONCE = 1 << 20  # weights unpacked at a time: some 20 MB meanwhile, and several adapters may be read together


class BaseWeights:
    """Modules by path, and which two of them are the input embedding and the output head."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        given: Any = model
        embedding, head = given.get_input_embeddings(), given.get_output_embeddings()
        self.embedding = self._path(embedding)
        self.head = self._path(head)
        self.behind_kv = behind_kv(model, self.head)
        self.tied = bool(embedding is not None and head is not None and head.weight is embedding.weight)

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """All modules by path."""
        return self._modules

    def get(self, path: str) -> nn.Module | None:
        """The module at `path` as the base has it, or None."""
        return self._modules.get(path)

    def dense(self, path: str) -> Tensor:
        """A linear layer's weight [out, in] in float32; quantized ones as they compute, dequantized.

        Raises `UnsupportedAdapter` for a storage whose numbers cannot be read back.
        """
        module: Any = self._modules[path]
        weight: Tensor = module.weight
        if weight.is_floating_point():
            return weight.detach().float()
        state = getattr(weight, "quant_state", None)
        if state is not None:
            return _dense_4bit(weight, state)
        scales = getattr(weight, "SCB", None)
        if scales is None:
            scales = getattr(getattr(module, "state", None), "SCB", None)
        if weight.dtype == torch.int8 and scales is not None:
            dense: Tensor = weight.detach().float() * (scales.float() / 127.0)[:, None]
            return dense
        raise UnsupportedAdapter(f"the weight of {path} is stored in a form that cannot be read back, which DoRA needs")

    def dense_rows(self, path: str) -> Iterator[Tensor]:
        """`dense` in stretches of rows, one after the other; short ones where a GPU would have to unpack them."""
        module = self._modules[path]
        if not isinstance(module, CodedLinear):
            yield self.dense(path)
            return
        count = max(1, _AT_ONCE // module.in_features)
        for first in range(0, module.out_features, count):
            yield module.unpacked(first, first + count).float()

    @torch.inference_mode()
    def settle(self) -> None:
        """Let bitsandbytes repack its 4-bit weights now (it does so in a layer's first call on the CPU), not in some
        step while the loader reads them."""
        for module in self._modules.values():
            if not isinstance(module, nn.Linear) or isinstance(module, PackedLinear):
                continue
            weight: Any = module.weight
            if getattr(weight, "quant_state", None) is not None:
                module(torch.zeros(1, module.in_features, dtype=torch.bfloat16, device=weight.device))

    def _path(self, wanted: Any) -> str | None:
        return next((path for path, module in self._modules.items() if module is wanted), None)


def _dense_4bit(weight: Any, state: Any) -> Tensor:
    """[out, in] float32 of a bitsandbytes 4-bit weight, also after its CPU kernel has repacked it in place."""
    from bitsandbytes import functional

    data = weight.data
    if not getattr(state, "packing_format_for_cpu", False):
        if data.shape == state.shape or data.numel() * 2 != state.shape.numel():
            raise UnsupportedAdapter("a weight is stored in a form that cannot be read back, which DoRA needs")
        dense: Tensor = functional.dequantize_4bit(data, state).float()
        return dense
    rows, columns = state.shape
    # As `functional._convert_weight_packed_for_cpu` lays it out: blocks of 32 rows; a byte holds row i in its low and
    # row i + 32 of a 64-long run in its high half; scales are [in / block, out] in bfloat16.
    packed = data.reshape(-1, 32)
    runs = torch.cat([packed & 0xF, packed >> 4], dim=-1)
    codes = runs.reshape(rows // 32, columns // 2, 32, 2).transpose(1, 2).reshape(rows, columns)
    scales = state.absmax.T.float().repeat_interleave(state.blocksize, dim=1)
    unpacked: Tensor = state.code.float()[codes.long()] * scales
    return unpacked
