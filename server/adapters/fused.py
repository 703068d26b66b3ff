"""Decoder layers with fewer, larger operations, for the families whose layers look like Llama's.

q, k and v are one matrix product, and so are gate and up; rotation, cache writes, attention of single tokens, norms
and activations are native kernels. The layer around them, and every other family, stays transformers' own. A batch in
which an adapter does more than rank rows runs through the single modules instead, which share the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.adapters.arena import Arena
from server.adapters.linear import ActiveAdapters, LoraLinear, SiteGroup
from server.kernels.native import MAX_HEAD_WIDTH, Native
from server.model.attention import AttentionPlan, PagedKv, prefill
from server.model.packed import pack_linears, pack_output_head

# Families whose attention, MLP and norm compute exactly what the modules below do.
_FAMILIES = ("Llama", "Mistral", "Qwen2")


class JointLinear:
    """Linear layers that share their input, their adapters included: x [T, in] → [T, sum of out]."""

    def __init__(self, linears: Sequence[LoraLinear], group: SiteGroup, active: ActiveAdapters) -> None:
        self._parts = [cast(nn.Linear, linear.base) for linear in linears]
        self._widths = [linear.out_features for linear in linears]
        self._group = group
        self._active = active
        self._together = pack_linears(*self._parts)
        self._weight, self._bias = (None, None) if self._together is not None else _joined(self._parts)

    def __call__(self, x: Tensor) -> Tensor:
        """All outputs side by side."""
        if self._together is not None:
            y = self._together(x)
        elif self._weight is not None:
            y = functional.linear(x, self._weight, self._bias)
        else:
            y = torch.cat([part(x) for part in self._parts], -1)
        self._active.add(x, self._group, torch.split(y, self._widths, -1))
        return y


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor | None, Tensor | None]:
    """One weight (and bias) for several plain layers, which become views of it; None for others."""
    biases = [linear.bias for linear in linears]
    if any(type(linear) is not nn.Linear for linear in linears) or len({bias is None for bias in biases}) > 1:
        return None, None
    weight = torch.cat([linear.weight.data for linear in linears])
    at = 0
    for linear in linears:
        linear.weight.data = weight[at : at + linear.out_features]
        at += linear.out_features
    return weight, None if biases[0] is None else torch.cat([bias.data for bias in biases])


class FusedAttention(nn.Module):
    """Self-attention of Llama's kind over paged keys and values."""

    def __init__(self, attention: Any, qkv: JointLinear, active: ActiveAdapters, kernels: Native) -> None:
        super().__init__()
        self._single = attention
        self._active = active
        self.layer_idx = int(attention.layer_idx)
        self._scaling = float(attention.scaling)
        # Qwen2 decides by layer, Mistral has one window for all; Llama's config knows none.
        self._window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        self._heads = attention.q_proj.out_features // attention.head_dim
        self._qkv = qkv
        self._out: LoraLinear = attention.o_proj
        self._kernels = kernels

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        paged: tuple[PagedKv, AttentionPlan],
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states: [1, T, hidden] → ([1, T, hidden], None)."""
        if not self._active.plain:
            single: tuple[Tensor, None] = self._single(
                hidden_states, position_embeddings=position_embeddings, paged=paged, **rest
            )
            return single
        kv, plan = paged
        k, v = kv.k[self.layer_idx], kv.v[self.layer_idx]
        cos, sin = position_embeddings
        qkv = self._qkv(hidden_states[0])
        q = self._kernels.rope_store(qkv, cos[0], sin[0], plan.write_slots, k, v, self._heads)
        parts = []
        if plan.decodes:
            parts.append(
                self._kernels.paged_decode(
                    q[: plan.decodes],
                    k,
                    v,
                    plan.pages,
                    plan.lengths,
                    plan.longest,
                    kv.page_tokens,
                    self._scaling,
                    self._window,
                    None,
                )
            )
        parts += [prefill(q, k, v, span, self._scaling, self._window, None) for span in plan.spans]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._out(out.reshape(1, q.shape[0], -1)), None


class FusedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)); x: [1, T, hidden]."""

    def __init__(self, mlp: Any, gate_up: JointLinear, active: ActiveAdapters, kernels: Native) -> None:
        super().__init__()
        self._single = mlp
        self._active = active
        self._gate_up = gate_up
        self._down: LoraLinear = mlp.down_proj
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """[1, T, hidden]."""
        if not self._active.plain:
            y: Tensor = self._single(x)
        else:
            y = self._down(self._kernels.silu_mul(self._gate_up(x[0]))[None])
        return y


class NativeRmsNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight."""

    def __init__(self, norm: Any, active: ActiveAdapters, kernels: Native) -> None:
        super().__init__()
        self._single = norm
        self._active = active
        self._eps = float(norm.variance_epsilon)
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape."""
        if not self._active.plain:
            y: Tensor = self._single(x)
            return y
        return self._kernels.rms_norm(x, self._single.weight, self._eps)


def fuse(model: nn.Module, arena: Arena, active: ActiveAdapters, kernels: Native) -> int:
    """Replace what can be replaced in a model whose linears are wrapped; returns the number of layers fused.

    0 where the family is another.
    """
    family = type(model).__name__.removesuffix("ForCausalLM")
    if family not in _FAMILIES:
        return 0
    layers = [
        (name, module) for name, module in model.named_modules() if type(module).__name__ == f"{family}DecoderLayer"
    ]
    for name, layer in layers:
        _fuse_layer(cast(Any, layer), name, arena, active, kernels)
    pack_output_head(model)
    decoder = cast(Any, model).model
    decoder.norm = NativeRmsNorm(decoder.norm, active, kernels)
    return len(layers)


def _fuse_layer(layer: Any, name: str, arena: Arena, active: ActiveAdapters, kernels: Native) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    if attention.head_dim <= MAX_HEAD_WIDTH:
        qkv = _joint(attention, f"{name}.self_attn", ("q_proj", "k_proj", "v_proj"), arena, active)
        layer.self_attn = FusedAttention(attention, qkv, active, kernels)
    if isinstance(mlp.act_fn, nn.SiLU) or type(mlp.act_fn).__name__ == "SiLUActivation":
        gate_up = _joint(mlp, f"{name}.mlp", ("gate_proj", "up_proj"), arena, active)
        layer.mlp = FusedMlp(mlp, gate_up, active, kernels)
    for out in (attention.o_proj, mlp.down_proj):
        pack_linears(out.base)
    layer.input_layernorm = NativeRmsNorm(layer.input_layernorm, active, kernels)
    layer.post_attention_layernorm = NativeRmsNorm(layer.post_attention_layernorm, active, kernels)


def _joint(owner: Any, path: str, names: Sequence[str], arena: Arena, active: ActiveAdapters) -> JointLinear:
    group = SiteGroup(arena, [f"{path}.{name}" for name in names])
    return JointLinear([getattr(owner, name) for name in names], group, active)
