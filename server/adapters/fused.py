"""Decoder layers as one native call, for the families whose layers look like Llama's.

transformers' model stays around them: embedding, rotation, last norm and output head are its own, but where it would
loop over its layers it finds a single one, which runs them all. A batch in which an adapter does more than rank rows
goes through the original layers instead, which share the weights; DoRA and biases on the layers' linears count as
rank rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from server.adapters.affine import AffineParts
from server.adapters.arena import Arena
from server.adapters.families import Family, family_of, silu, window_of
from server.adapters.linear import ActiveAdapters, LoraLinear, SiteGroup
from server.kernels.native import MAX_HEAD_WIDTH, Native
from server.kernels.native.decoder import Decoder, JointLinears, LayerParts, Shape
from server.kernels.native.packing import PackedProduct
from server.model.attention import AttentionPlan, PagedKv, prefill
from server.model.packed import PackedLinear, let_go_of_checkpoint, pack_linear, pack_output_head, packable


class FusedLayers(nn.Module):
    """All decoder layers; takes the place of the first and only one in transformers' loop."""

    def __init__(
        self, single: nn.ModuleList, shape: Shape, parts: Sequence[LayerParts], active: ActiveAdapters, kernels: Native
    ) -> None:
        super().__init__()
        self._single = single
        self._shape = shape
        self._parts = parts
        self._active = active
        self._kernels = kernels
        self._decoder: Decoder | None = None

    def first(self, layers: int) -> FusedLayers:
        """The first so many of these layers, with work space of their own."""
        single = nn.ModuleList(list(self._single)[:layers])
        return FusedLayers(single, self._shape, self._parts[:layers], self._active, self._kernels)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        paged: tuple[PagedKv, AttentionPlan],
        **rest: Any,
    ) -> Tensor:
        """hidden_states: [1, T, hidden] → the same after all layers."""
        kv, plan = paged
        if not self._parts:
            return hidden_states
        if not self._active.plain or plan.listed is None:
            for layer in self._single:
                hidden_states = layer(hidden_states, position_embeddings=position_embeddings, paged=paged, **rest)
            return hidden_states
        if self._decoder is None:
            self._decoder = Decoder(self._kernels, self._shape, self._parts, list(zip(kv.k, kv.v, strict=True)))
        cos, sin = position_embeddings

        def others(layer: int, q: Tensor, out: Tensor) -> None:
            for span in plan.spans:
                window = self._parts[layer].window
                out[span.t0 : span.t1] = prefill(q, kv.k[layer], kv.v[layer], span, self._shape.scale, window, None)

        return self._decoder.run(
            hidden_states[0],
            (cos[0], sin[0]),
            plan.write_slots,
            plan.listed,
            kv.page_tokens,
            self._active.native_plans,
            others if plan.spans else None,
            self._active.affine,
            self._active.between,
        )[None]


class NativeRmsNorm(nn.Module):
    """The last norm; x / sqrt(mean(x²) + eps) * weight."""

    def __init__(self, norm: Any, late: bool, active: ActiveAdapters, kernels: Native) -> None:
        super().__init__()
        self._single = norm
        self._weight = norm.weight.data.float()
        self._eps = float(norm.variance_epsilon)
        self._late = late
        self._active = active
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Of x's shape."""
        if not self._active.plain:
            y: Tensor = self._single(x)
            return y
        return self._kernels.rms_norm(x, self._weight, self._eps, self._late)


def pack_weights(model: nn.Module) -> None:
    """Pack what native products compute faster than torch: bfloat16 and NF4 weights, those of the output head too.

    The model's linears are wrapped.
    """
    for module in list(model.modules()):
        if isinstance(module, LoraLinear) and not _is_float32(module.base):
            pack_linear(module.base)
    pack_output_head(model)
    let_go_of_checkpoint(model)


def fusable(model: nn.Module) -> bool:
    """Whether `fuse` can replace the model's layers; asked before or after its linears are wrapped."""
    family = family_of(model)
    return family is not None and all(_fits(layer, family) for layer in cast(Any, model).model.layers)


def fuse(model: nn.Module, arena: Arena, active: ActiveAdapters, kernels: Native) -> AffineParts:
    """Replace the layers of a fusable model whose linears are wrapped; what they can do besides rank rows."""
    family = family_of(model)
    if family is None:
        raise AssertionError(f"{type(model).__name__} has no native layers")
    decoder = cast(Any, model).model
    single: nn.ModuleList = decoder.layers
    layers = [cast(Any, layer) for layer in single]
    parts = [
        _parts(layer, f"model.layers.{index}", family, arena, window_of(layer.self_attn))
        for index, layer in enumerate(layers)
    ]
    attention, mlp = layers[0].self_attn, layers[0].mlp
    width = int(attention.head_dim)
    heads = attention.o_proj.base.in_features // width
    qkv = sum(getattr(attention, each).out_features for each in family.qkv)
    norm = decoder.norm
    shape = Shape(
        hidden=attention.o_proj.out_features,
        heads=heads,
        kv_heads=(qkv // width - heads) // 2,
        width=width,
        inner=mlp.down_proj.base.in_features,
        late_norm=family.late_norm,
        flat_norm=family.flat_norm,
        eps=float(norm.variance_epsilon),
        scale=float(attention.scaling),
    )
    decoder.layers = nn.ModuleList([FusedLayers(single, shape, parts, active, kernels)])
    decoder.norm = NativeRmsNorm(norm, family.late_norm, active, kernels)
    return AffineParts(_places(family, len(layers)), len(layers))


def _fits(layer: Any, family: Family) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    linears = [
        *(getattr(attention, name) for name in (*family.qkv, "o_proj")),
        *(getattr(mlp, name) for name in (*family.gate_up, "down_proj")),
    ]
    linears_fit = all(packable(linear.base if isinstance(linear, LoraLinear) else linear) for linear in linears)
    return silu(mlp) and linears_fit and attention.head_dim <= MAX_HEAD_WIDTH


def _parts(layer: Any, path: str, family: Family, arena: Arena, window: int | None) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp

    def norm(owner: Any, name: str | None) -> Tensor | None:
        return None if name is None else getattr(owner, name).weight.data.float()

    return LayerParts(
        qkv=_joint(attention, f"{path}.self_attn", family.qkv, arena),
        out=_joint(attention, f"{path}.self_attn", ("o_proj",), arena),
        gate_up=_joint(mlp, f"{path}.mlp", family.gate_up, arena),
        down=_joint(mlp, f"{path}.mlp", ("down_proj",), arena),
        before_attention=norm(layer, family.before_attention),
        after_attention=norm(layer, family.after_attention),
        before_mlp=norm(layer, family.before_mlp),
        after_mlp=norm(layer, family.after_mlp),
        q_norm=norm(attention, "q_norm" if family.head_norms else None),
        k_norm=norm(attention, "k_norm" if family.head_norms else None),
        window=window,
    )


def _places(family: Family, layers: int) -> dict[str, int]:
    """Module path → place in an `AffineTable`."""
    joints = (
        *(("self_attn", names) for names in (family.qkv, ("o_proj",))),
        *(("mlp", names) for names in (family.gate_up, ("down_proj",))),
    )
    return {
        f"model.layers.{layer}.{owner}.{name}": 3 * (4 * layer + joint) + number
        for layer in range(layers)
        for joint, (owner, names) in enumerate(joints)
        for number, name in enumerate(names)
    }


def _joint(owner: Any, path: str, names: Sequence[str], arena: Arena) -> JointLinears:
    group = SiteGroup(arena, [f"{path}.{name}" for name in names])
    linears = []
    for name in names:
        base = getattr(owner, name).base
        pack_linear(base)
        linears.append(cast(PackedLinear, base))
    product = PackedProduct(
        [linear.packed for linear in linears],
        [None if linear.bias is None else linear.bias.data for linear in linears],
    )
    return JointLinears(product, group.native)


def _is_float32(linear: nn.Module) -> bool:
    return type(linear) is nn.Linear and linear.weight.dtype == torch.float32
