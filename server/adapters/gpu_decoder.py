"""A decoder's layers by the GPU's kernels, for the families whose layers look like Llama's.

transformers' model stays as it is and shares its weights with this one: embedding, rotation and output head are its
own modules, called as it calls them; a batch in which an adapter does more within the layers than rank rows runs
through transformers' layers instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from server.adapters.arena import Arena
from server.adapters.families import Family, family_of, silu, window_of
from server.adapters.gpu_active import GpuAdapters
from server.adapters.linear import LoraLinear, SiteGroup
from server.kernels.gpu import elementwise, nf4
from server.kernels.gpu.door import GpuKernels
from server.model.attention import PagedKv
from server.model.gpu_attention import attend_new
from server.model.gpu_linear import Nf4Linear
from server.model.runner import PackedBatch

# Rotations whose angles depend on a token's own position alone.
_STATIC_ROPES = frozenset({"default", "linear", "llama3", "yarn"})


class JointLinear:
    """Linear layers of one input, side by side: one product, then every row's own deltas."""

    def __init__(self, linears: Sequence[Any], group: SiteGroup, active: GpuAdapters, gpu: GpuKernels) -> None:
        self.group = group
        self._active = active
        self._workspace = gpu.workspace
        self.packed: nf4.Nf4Weight | None = None
        self._dense: Tensor | None = None
        if all(isinstance(linear, Nf4Linear) for linear in linears):
            self.packed = _join_packed(linears)
        else:
            self._dense = _join_dense(linears)
        self._bias = _join_biases(linears)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, in] → [T, sum of out]."""
        add_deltas = self._active.begin(x, self.group)
        if self.packed is not None:
            y = nf4.matmul(x, self.packed, self._workspace, self._bias)
        else:
            y = functional.linear(x, cast(Tensor, self._dense), self._bias)
        add_deltas(y)
        return y


@dataclass(frozen=True)
class _Layer:
    qkv: JointLinear
    out: JointLinear
    gate_up: JointLinear
    down: JointLinear
    before_attention: Tensor
    before_mlp: Tensor
    q_norm: Tensor | None  # [width], of every head
    k_norm: Tensor | None
    window: int | None


class GpuDecoder:
    """Runs packed batches whose attention plan has its `gpu` filled; made only where `decodable`."""

    def __init__(self, model: nn.Module, arena: Arena, active: GpuAdapters, gpu: GpuKernels) -> None:
        """The model's linears are wrapped."""
        family = family_of(model)
        if family is None:
            raise AssertionError(f"{type(model).__name__} has no layers for a GPU")
        given: Any = model
        self._embed = given.get_input_embeddings()
        self._head = given.get_output_embeddings()
        self._rope = given.model.rotary_emb
        self._norm = given.model.norm.weight.data
        self._eps = float(given.model.norm.variance_epsilon)
        layers = list(given.model.layers)
        self._layers = [
            _layer(layer, f"model.layers.{i}", family, arena, active, gpu) for i, layer in enumerate(layers)
        ]
        attention = layers[0].self_attn
        self._width = int(attention.head_dim)
        self._heads = attention.o_proj.base.in_features // self._width
        self._scale = float(attention.scaling)

    @property
    def packed(self) -> list[nf4.Nf4Weight]:
        """The weights in NF4 that a step multiplies by, of all layers."""
        joined = [j.packed for layer in self._layers for j in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        return [weight for weight in joined if weight is not None]

    @property
    def groups(self) -> list[SiteGroup]:
        """The linears that share an input, of all layers."""
        return [j.group for layer in self._layers for j in (layer.qkv, layer.out, layer.gate_up, layer.down)]

    def run(self, batch: PackedBatch, kv: PagedKv, out: Tensor | None = None) -> Tensor:
        """Write the batch's keys and values and return the logits [S, vocabulary] in float32, in `out` where given.

        May be captured: it reads nothing but its tensors, and launches the same for tensors of the same shapes.
        """
        plan = batch.attention
        if plan.gpu is None:
            raise AssertionError("this batch was not laid out for a GPU")
        embedded = self._embed(batch.token_ids[None])
        cos, sin = (t[0].contiguous() for t in self._rope(embedded, position_ids=batch.positions[None]))
        residual = embedded[0]
        x: Tensor | None = None  # what the residual stream still lacks
        for number, layer in enumerate(self._layers):
            normed = self._normed(x, layer.before_attention, residual)
            qkv = layer.qkv(normed)
            self._norm_heads(qkv, layer)
            k, v = kv.k[number], kv.v[number]
            seen = attend_new(
                qkv,
                cos,
                sin,
                plan.write_slots,
                k,
                v,
                plan.gpu,
                heads=self._heads,
                page_tokens=kv.page_tokens,
                scale=self._scale,
                window=layer.window,
            )
            x = layer.out(seen.view(seen.shape[0], -1))
            normed = self._normed(x, layer.before_mlp, residual)
            x = layer.down(elementwise.silu_mul(layer.gate_up(normed)))
        normed = self._normed(x, self._norm, residual)
        logits: Tensor = self._head(normed[None][:, batch.sample_rows])[0]
        return logits.float() if out is None else out.copy_(logits)

    def _normed(self, x: Tensor | None, weight: Tensor, residual: Tensor) -> Tensor:
        """residual += x, and that normed."""
        if x is None:
            return elementwise.rms_norm(residual, weight, self._eps)
        return elementwise.rms_norm(x, weight, self._eps, add=residual)

    def _norm_heads(self, qkv: Tensor, layer: _Layer) -> None:
        """Norm every query and key head for itself, in place; nothing in families that do not."""
        if layer.q_norm is None or layer.k_norm is None:
            return
        rows, queries = qkv.shape[0], self._heads * self._width
        keys = (qkv.shape[1] - queries) // 2
        for start, stop, weight in ((0, queries, layer.q_norm), (queries, queries + keys, layer.k_norm)):
            heads = qkv[:, start:stop].reshape(rows, -1, self._width).contiguous()
            qkv[:, start:stop] = elementwise.rms_norm(heads, weight, self._eps).view(rows, -1)


def decodable(model: nn.Module) -> bool:
    """Whether a `GpuDecoder` can be made of the model; asked after NF4 was converted, before linears are wrapped."""
    family = family_of(model)
    if family is None or family.before_attention is None or family.before_mlp is None or family.after_mlp is not None:
        return False
    decoder: Any = cast(Any, model).model
    rope = decoder.rotary_emb
    first = decoder.layers[0].self_attn
    if getattr(rope, "rope_type", None) not in _STATIC_ROPES or 2 * rope.inv_freq.numel() != first.head_dim:
        return False
    return all(_fits(layer, family) for layer in decoder.layers)


def _fits(layer: Any, family: Family) -> bool:
    joint = [
        [getattr(layer.self_attn, name) for name in family.qkv],
        [layer.self_attn.o_proj],
        [getattr(layer.mlp, name) for name in family.gate_up],
        [layer.mlp.down_proj],
    ]
    alike = all({type(linear) for linear in linears} in ({Nf4Linear}, {nn.Linear}) for linears in joint)
    return alike and silu(layer.mlp)


def _layer(layer: Any, path: str, family: Family, arena: Arena, active: GpuAdapters, gpu: GpuKernels) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp

    def joint(owner: Any, where: str, names: Sequence[str]) -> JointLinear:
        linears = [cast(LoraLinear, getattr(owner, name)).base for name in names]
        return JointLinear(linears, SiteGroup(arena, [f"{where}.{name}" for name in names]), active, gpu)

    return _Layer(
        qkv=joint(attention, f"{path}.self_attn", family.qkv),
        out=joint(attention, f"{path}.self_attn", ("o_proj",)),
        gate_up=joint(mlp, f"{path}.mlp", family.gate_up),
        down=joint(mlp, f"{path}.mlp", ("down_proj",)),
        before_attention=getattr(layer, str(family.before_attention)).weight.data,
        before_mlp=getattr(layer, str(family.before_mlp)).weight.data,
        q_norm=attention.q_norm.weight.data if family.head_norms else None,
        k_norm=attention.k_norm.weight.data if family.head_norms else None,
        window=window_of(attention),
    )


def _join_packed(linears: Sequence[Nf4Linear]) -> nf4.Nf4Weight:
    """One weight of several; the layers themselves keep views of it, not copies beside it."""
    if len(linears) == 1:
        return linears[0].packed
    whole = nf4.side_by_side([linear.packed for linear in linears])
    at = 0
    for linear in linears:
        end = at + linear.out_features
        linear.packed = nf4.Nf4Weight(whole.codes[at:end], whole.scales[at:end], whole.levels)
        at = end
    return whole


def _join_dense(linears: Sequence[nn.Linear]) -> Tensor:
    if len(linears) == 1:
        return linears[0].weight.data
    whole = torch.cat([linear.weight.data for linear in linears])
    at = 0
    for linear in linears:
        end = at + linear.out_features
        linear.weight.data = whole[at:end]
        at = end
    return whole


def _join_biases(linears: Sequence[nn.Linear]) -> Tensor | None:
    given = [None if linear.bias is None else linear.bias.data for linear in linears]
    known = next((bias for bias in given if bias is not None), None)
    if known is None:
        return None
    return torch.cat(
        [known.new_zeros(linear.out_features) if b is None else b for linear, b in zip(linears, given, strict=True)]
    )
