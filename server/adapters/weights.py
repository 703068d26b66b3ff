"""An adapter's files turned into weights that fit this server's base, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hub.base import BaseIdentity
from hub.lora_config import LoraConfig, parse_tensor_name
from server.adapters.base_weights import BaseWeights
from server.adapters.bind_parts import BoundParts, Given, bind_parts
from server.adapters.kv_reach import reaches_kv
from server.adapters.layouts import Layouts
from server.adapters.parts import NO_PARTS, AdapterParts
from server.adapters.rank_rows import Pair, SiteWeights, check_shapes, rank_rows
from server.adapters.weights_file import tensors_in
from server.errors import AdapterUnservable, BaseMismatch, TensorUnbound, UnsupportedAdapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# Of `LoraConfig.features`; a plain LoRA needs none of them.
_SERVED_FEATURES = frozenset(
    {
        "rslora",
        "rank_pattern",
        "alpha_pattern",
        "lora_bias",
        "bias",
        "dora",
        "modules_to_save",
        "trainable_tokens",
    }
)


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter as the hub hands it over, verified."""

    digest: str
    config: bytes
    weights: bytes
    base_name: str | None
    base_fingerprint: str | None  # None: unverified, only names and shapes are checked
    corrects_nf4: bool = False  # see `hub.facts.corrects_nf4`


AdapterFetch = Callable[[str], AdapterFiles]
"""From a digest to its files; raises the hub's errors."""


@dataclass(frozen=True)
class LoraWeights:
    """A parsed adapter in host memory, ready to be copied into the arena."""

    digest: str
    rank: int  # the largest over its sites: rows it needs in the arena
    sites: Mapping[str, SiteWeights]
    warnings: tuple[str, ...]
    parts: AdapterParts = NO_PARTS
    reaches_kv: bool = True  # whether it might change a key or value; if not, its KV pages are the base's

    @cached_property  # asked of every parsed adapter whenever host memory is looked through
    def bytes(self) -> int:
        """Host memory held."""
        return self.parts.bytes + sum(t.numel() * t.itemsize for site in self.sites.values() for t in (site.a, site.b))


def parse_adapter(
    files: AdapterFiles,
    shapes: Mapping[str, tuple[int, int]],
    base: BaseIdentity,
    dtype: torch.dtype,
    max_rank: int,
    modules: BaseWeights,
    layouts: Layouts | None = None,
) -> LoraWeights:
    """Bind every tensor of the adapter to a module of the base.

    `shapes` maps a module path to (out, in). `layouts`: those met before with the same arguments but `files`. Raises
    `BaseMismatch`, `RankTooLarge`, `UnsupportedAdapter`, `TensorUnbound` or the hub's `AdapterRejected`, each naming
    what it is about.
    """
    if files.base_fingerprint and base.fingerprint and files.base_fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"the adapter was trained on {files.base_name or 'another base'} (fingerprint "
            f"{files.base_fingerprint[:19]}…), this server holds {base.name} ({base.fingerprint[:19]}…)"
        )
    if files.corrects_nf4 and base.quantization != "nf4":
        held = "full precision" if base.quantization in (None, "none") else base.quantization
        raise BaseMismatch(
            "the adapter was trained with init qera: part of it undoes what NF4 did to the base, which is held in "
            f"{held} here; serve it with --quantize nf4"
        )
    layout = None if layouts is None else layouts.find(files.config, files.weights)
    if layout is not None:
        return _weights(files.digest, layout.rows(files.weights), modules, BoundParts(NO_PARTS, {}, inert=True))
    config = LoraConfig.parse(files.config)
    _refuse_unsupported(config)
    tensors = tensors_in(files.weights)
    halves: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Given] = {}
    for key, tensor in tensors.items():
        site = parse_tensor_name(key)
        if modules.get(site.module) is None:
            experts = "; LoRA on a mixture's experts is not served" if ".experts" in site.module else ""
            raise TensorUnbound(f"tensor {key} belongs to no module of {base.name}{experts}")
        if site.kind in ("lora_A", "lora_B") and site.module in shapes:
            halves.setdefault(site.module, {})[site.kind] = tensor
        else:
            if not torch.isfinite(tensor).all():
                raise AdapterUnservable(f"tensor {key} holds NaN or infinite values")
            others.setdefault(site.module, {})[site.kind, site.parameter] = tensor.clone()
    if not tensors:
        raise TensorUnbound("the adapter holds no tensors")

    pairs = {}
    for module, half in halves.items():
        if len(half) != 2:
            raise TensorUnbound(f"module {module} has {next(iter(half))} without its other half")
        pairs[module] = Pair(half["lora_A"], half["lora_B"])
        check_shapes(module, pairs[module], shapes[module], max_rank)
    bound = bind_parts(
        config,
        bool(json.loads(files.config).get("ensure_weight_tying")),
        {module: (pair.a, pair.b) for module, pair in pairs.items()},
        others,
        modules,
        dtype,
        max_rank,
    )
    for module, factor in bound.factors.items():
        pairs[module] = Pair(pairs[module].a, pairs[module].b.float() * factor[:, None])
    sites = rank_rows(pairs, config, dtype)
    if layouts is not None and not others:
        layouts.keep(files.config, files.weights, config, pairs, sites)
    return _weights(files.digest, sites, modules, bound)


def _weights(digest: str, sites: Mapping[str, SiteWeights], modules: BaseWeights, bound: BoundParts) -> LoraWeights:
    rank = max((site.a.shape[0] for site in sites.values()), default=1)
    warnings: tuple[str, ...] = ()
    if bound.inert and not any(bool(site.b.any()) and bool(site.a.any()) for site in sites.values()):
        warnings = ("the adapter changes nothing: its delta is zero everywhere",)
    reaches = reaches_kv(sites, bound.parts.modules, modules.head, modules.behind_kv)
    return LoraWeights(digest, rank, sites, warnings, bound.parts, reaches)


def _refuse_unsupported(config: LoraConfig) -> None:
    """Name what the format knows and this server does not serve yet: better than a wrong answer."""
    unserved = [feature for feature in config.features if feature not in _SERVED_FEATURES]
    if config.fan_in_fan_out:
        unserved.append("fan_in_fan_out")
    if unserved:
        raise UnsupportedAdapter(f"adapters with {', '.join(unserved)} are not served")
