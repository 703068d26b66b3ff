"""The tensors of an adapter that are not rank rows of an ordinary linear layer, bound to the base's modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hub.lora_config import LoraConfig
from server.adapters.base_weights import BaseWeights
from server.adapters.parts import NO_PARTS, AdapterParts, LowRank, ModuleParts, TokenRows
from server.errors import RankTooLarge, TensorUnbound, UnsupportedAdapter
from server.model.coded import CodedLinear
from server.model.packed import PackedEmbedding, PackedLinear

# (kind, parameter) of `hub.tensor_names.TensorSite` -> tensor
Given = dict[tuple[str, str], Tensor]

# Relative; a DoRA that was never trained has magnitudes equal to the norms but for rounding.
_NO_CHANGE = 1e-6


@dataclass(frozen=True)
class BoundParts:
    """What binding found."""

    parts: AdapterParts
    factors: Mapping[str, Tensor]  # DoRA: by module, [out] to be multiplied into the arena's B
    inert: bool  # no part changes anything


def bind_parts(
    config: LoraConfig,
    ties_weights: bool,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    others: Mapping[str, Given],
    base: BaseWeights,
    dtype: torch.dtype,
    max_rank: int,
) -> BoundParts:
    """Bind `others`, by module path; `pairs` are the (A, B) of linears that have arena rows.

    `ties_weights`: the config's `ensure_weight_tying`. Raises `TensorUnbound` for what has no place in the base and
    `UnsupportedAdapter`, naming it, for what has no exact meaning here.
    """
    if not others:
        return BoundParts(NO_PARTS, {}, inert=True)
    binder = _Binder(config, base, dtype, max_rank)
    for path, given in others.items():
        binder.bind(path, dict(given), pairs.get(path))
    binder.tie_tokens()
    if ties_weights and base.tied and {base.embedding, base.head} & binder.touched:
        raise UnsupportedAdapter(
            "ensure_weight_tying on an embedding and output head that share their weight is not served"
        )
    parts = AdapterParts(binder.modules, tuple(sorted(binder.alone)))
    return BoundParts(parts, binder.factors, binder.inert)


class _Binder:
    def __init__(self, config: LoraConfig, base: BaseWeights, dtype: torch.dtype, max_rank: int) -> None:
        self._config = config
        self._base = base
        self._dtype = dtype
        self._max_rank = max_rank
        self.modules: dict[str, ModuleParts] = {}
        self.factors: dict[str, Tensor] = {}
        self.alone: set[str] = set()
        self.touched: set[str | None] = set()
        self.inert = True

    def bind(self, path: str, given: Given, pair: tuple[Tensor, Tensor] | None) -> None:
        module: Any = self._base.get(path)
        if module is None:
            raise TensorUnbound(f"{path} holds {_kinds(given)}, but the base has no such module")
        in_arena = pair is not None
        pair = pair or self._own_pair(path, module, given)
        self._drop_copies(path, module, given)
        self._drop_copies_of_bias(path, module, given)
        saved = {name: given.pop((kind, name)) for kind, name in list(given) if kind == "saved"}
        tokens = given.pop(("trainable_tokens", "weight"), None)
        if (saved or tokens is not None) and (pair is not None or given or (saved and tokens is not None)):
            raise UnsupportedAdapter(f"{path} is both replaced and adapted by {_kinds(given) or 'a LoRA'}")
        if saved:
            listed = self._listed(path)
            if not listed and (self._config.bias != "all" or set(saved) != {"bias"}):
                raise UnsupportedAdapter(f"{path} is replaced, but modules_to_save does not list it")
            self.alone.add("modules_to_save" if listed else "bias=all")
            self._put(path, ModuleParts(replacement=self._replacement(path, module, saved)))
        elif tokens is not None:
            self.alone.add("trainable_token_indices")
            self._put(path, ModuleParts(tokens=self._tokens(path, module, tokens)))
        elif pair is not None or given:
            self._put(path, self._added(path, module, given, pair, in_arena))
        if given:
            raise UnsupportedAdapter(f"{path} holds {_kinds(given)}, which is not served there")

    def tie_tokens(self) -> None:
        """PEFT's rule: token rows of a tied embedding are the head's too, unless the head has its own."""
        embedding, head = self._base.embedding, self._base.head
        tokens = self.modules[embedding].tokens if embedding in self.modules else None
        if tokens is None or head is None or not self._base.tied:
            return
        if head not in self.modules:
            self.modules[head] = ModuleParts(tokens=tokens)
        elif self.modules[head].tokens is None:
            raise UnsupportedAdapter(f"trained tokens of a tied embedding together with other parts on {head}")

    def _put(self, path: str, parts: ModuleParts) -> None:
        self.touched.add(path)
        self.modules[path] = parts

    # -- what adds to the base ------------------------------------------------------------------------------------

    def _own_pair(self, path: str, module: nn.Module, given: Given) -> tuple[Tensor, Tensor] | None:
        """The LoRA of a module without arena rows: the output head or an embedding."""
        kinds = ("embedding_A", "embedding_B") if isinstance(module, nn.Embedding) else ("lora_A", "lora_B")
        found = [given.pop((kind, "weight"), None) for kind in kinds]
        if found[0] is None and found[1] is None:
            return None
        a, b = found
        if a is None or b is None:
            raise TensorUnbound(f"module {path} has one half of its low-rank pair without the other")
        if path not in (self._base.head, self._base.embedding):
            raise TensorUnbound(f"module {path} has a LoRA, but it is no linear layer that every token passes")
        rank = a.shape[0]
        rows, columns = _weight(module).shape
        if isinstance(module, nn.Embedding):
            rows, columns = columns, rows
        if a.shape != (rank, columns) or b.shape != (rows, rank):
            raise TensorUnbound(f"module {path}: the LoRA's factors are {list(b.shape)} and {list(a.shape)}")
        if rank > self._max_rank:
            raise RankTooLarge(f"module {path} has rank {rank}, this server serves up to {self._max_rank}")
        return a, b

    def _added(
        self, path: str, module: Any, given: Given, pair: tuple[Tensor, Tensor] | None, in_arena: bool
    ) -> ModuleParts:
        scaling = 0.0 if pair is None else self._config.scaling(path, pair[0].shape[0])
        own_bias: Any = getattr(module, "bias", None)
        # Not the weight's own shape where that may be packed.
        out = module.out_features if isinstance(module, nn.Linear) else _weight(module).shape[-1]
        scale = factor = None
        shift = torch.zeros(out)
        magnitude = given.pop(("magnitude", "weight"), None)
        if magnitude is not None:
            if pair is None or isinstance(module, nn.Embedding):
                raise UnsupportedAdapter(f"DoRA on {path}, which is no linear layer with a LoRA, is not served")
            factor = self._dora(path, magnitude, pair, scaling)
            scale = factor - 1
            if own_bias is not None:
                shift -= scale * own_bias.float().cpu()
            if in_arena:
                self.factors[path] = factor
            self.inert &= bool(scale.abs().max() < _NO_CHANGE)
        lora_bias = given.pop(("lora_bias", "bias"), None)
        if lora_bias is not None:
            if magnitude is not None or pair is None:
                raise UnsupportedAdapter(f"{path} has a lora_bias with DoRA or without a LoRA, which is not served")
            shift += scaling * _fitting(path, lora_bias, (out,)).float()
            self.inert &= not bool(lora_bias.any())
        trained = given.pop(("base", "bias"), None)
        if trained is not None:
            self.alone.add(f"bias={self._config.bias}")
            shift += _fitting(path, trained, (out,)).float() - own_bias.float().cpu()
            self.inert = False
        low_rank = None
        if pair is not None and not in_arena:
            a, b = pair
            wide = scaling * b.float().T
            if factor is not None:
                wide = wide * factor
            low_rank = LowRank(a.to(self._dtype).contiguous(), (wide * _embed_scale(module)).to(self._dtype))
            self.inert &= not (bool(a.any()) and bool(b.any()))
        return ModuleParts(scale=scale, shift=shift if bool(shift.any()) else None, low_rank=low_rank)

    def _dora(self, path: str, magnitude: Tensor, pair: tuple[Tensor, Tensor], scaling: float) -> Tensor:
        """c [out] = m / |W + s·BA| by output row, in float32 on the CPU."""
        a, b = (half.float() for half in pair)
        found: list[Tensor] = []
        first = 0
        for weight in self._base.dense_rows(path):
            last = first + weight.shape[0]
            a, rows = a.to(weight.device), b[first:last].to(weight.device)
            found.append(torch.linalg.norm(torch.addmm(weight, rows, a, alpha=scaling), dim=1))
            first = last
        norms = torch.cat(found).cpu()
        factor: Tensor = _fitting(path, magnitude, tuple(norms.shape)).float() / norms
        if not torch.isfinite(factor).all():
            raise UnsupportedAdapter(f"DoRA on {path}: a row of the adapted weight is zero, so it has no direction")
        return factor

    # -- what replaces the base's ---------------------------------------------------------------------------------

    def _drop_copies(self, path: str, module: Any, given: Given) -> None:
        """Take out copies of the base's own weight, which PEFT saves beside a LoRA on an embedding or head."""
        for kind in ("base", "saved"):
            if kind == "saved" and self._listed(path):
                continue
            tensor = given.pop((kind, "weight"), None)
            if tensor is None:
                continue
            own = _weight(module)
            if tensor.shape != own.shape:
                raise TensorUnbound(f"{path}: the adapter's copy is {list(tensor.shape)}, the base's {list(own.shape)}")
            own = own.cpu()
            if not (torch.equal(tensor.to(own.dtype), own) or torch.equal(own.to(tensor.dtype), tensor)):
                raise UnsupportedAdapter(
                    f"{path}: the adapter carries a copy of the base's weight that differs from this base's, and "
                    "modules_to_save does not list it"
                )

    def _drop_copies_of_bias(self, path: str, module: Any, given: Given) -> None:
        """Give a trained bias of a linear layer one name, whether PEFT saved it beside a LoRA or on its own."""
        if not isinstance(module, nn.Linear) or self._listed(path):
            if ("base", "bias") in given:
                raise UnsupportedAdapter(f"{path}: a trained bias is not served there")
            return
        if ("saved", "bias") in given:
            given["base", "bias"] = given.pop(("saved", "bias"))
        if ("base", "bias") not in given:
            return
        if module.bias is None:
            raise TensorUnbound(f"{path} has no bias in the base, the adapter brings one")
        if self._config.bias == "none":
            tensor, own = given["base", "bias"], module.bias.cpu()
            if tensor.shape != own.shape or not torch.equal(tensor.to(own.dtype), own):
                raise UnsupportedAdapter(f"{path} has a trained bias, but the config says bias=none")
            del given["base", "bias"]

    def _listed(self, path: str) -> bool:
        """PEFT's rule: a module is saved whole when its name, or one above it, ends with a listed text."""
        parts = path.split(".")
        above = (".".join(parts[: count + 1]) for count in range(len(parts)))
        return any(name.endswith(self._config.modules_to_save) for name in above)

    def _replaceable(self, path: str, module: nn.Module) -> bool:
        """Whether the module is called once a step, with every row, and gives one output row for each."""
        if isinstance(module, nn.Embedding):
            return path == self._base.embedding
        if isinstance(module, nn.Linear):
            return ".experts." not in path
        parameters = list(module.parameters(recurse=False))
        return not list(module.children()) and bool(parameters) and all(p.dim() == 1 for p in parameters)

    def _replacement(self, path: str, module: Any, saved: Mapping[str, Tensor]) -> nn.Module:
        """The module as the adapter has it; parameters it does not bring stay the base's."""
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, PackedLinear | PackedEmbedding):
            own["weight"] = nn.Parameter(module.weight, requires_grad=False)
        elif isinstance(module, CodedLinear):
            own["weight"] = nn.Parameter(module.codes, requires_grad=False)  # as the layers of bitsandbytes have it
        if not self._replaceable(path, module):
            raise UnsupportedAdapter(
                f"modules_to_save lists {path}, a {type(module).__name__}: only linear layers that every token passes, "
                "norms, the embedding and the output head can be replaced"
            )
        for name, tensor in saved.items():
            if name not in own:
                raise TensorUnbound(f"{path} has no parameter {name}, which the adapter replaces")
            if isinstance(module, nn.Linear) and name == "weight":
                _fitting(path, tensor, (module.out_features, module.in_features))
            else:
                _fitting(path, tensor, tuple(own[name].shape))
        replaced = {name: tensor.to(self._dtype) for name, tensor in saved.items()}
        self.inert &= all(
            tensor.shape == own[name].shape and torch.equal(tensor, own[name].cpu().to(self._dtype))
            for name, tensor in replaced.items()
        )
        if isinstance(module, nn.Linear):
            if "weight" not in replaced and not own["weight"].is_floating_point():
                raise UnsupportedAdapter(f"{path}: only the bias of a quantized layer is replaced, which is not served")
            clone: Any = nn.Linear(module.in_features, module.out_features, bias="bias" in own, device="meta")
        elif isinstance(module, PackedEmbedding):
            clone = nn.Embedding(module.num_embeddings, module.embedding_dim, device="meta")
        else:
            clone = copy.copy(module)
            clone.__dict__.pop("forward", None)  # ours, where the original's is already taken over
            clone._parameters = {}
        for name, parameter in own.items():
            clone._parameters[name] = nn.Parameter(replaced.get(name, parameter.data), requires_grad=False)
        result: nn.Module = clone.eval()
        return result

    def _tokens(self, path: str, module: Any, rows: Tensor) -> TokenRows:
        if path not in (self._base.embedding, self._base.head):
            raise UnsupportedAdapter(f"trained tokens on {path}, which is neither the embedding nor the head")
        given = self._config.trainable_token_indices
        if isinstance(given, Mapping):
            given = next((ids for name, ids in given.items() if path.endswith(name)), None)
        vocabulary, hidden = _weight(module).shape
        if given is None or len(given) != len(set(given)) or not all(0 <= token < vocabulary for token in given):
            raise TensorUnbound(f"{path} has trained tokens, but the config's indices do not name that many of its own")
        ids = torch.tensor(given)
        index = torch.full((vocabulary,), -1)
        index[ids] = torch.arange(len(ids))
        rows = _fitting(path, rows, (len(given), hidden)).to(self._dtype).contiguous()
        self.inert &= torch.equal(rows, _weight(module)[ids].cpu().to(self._dtype))
        if getattr(module, "bias", None) is not None:
            raise UnsupportedAdapter(f"trained tokens on {path}, which has a bias: PEFT leaves it out")
        return TokenRows(ids, rows, index, _embed_scale(module))


def _weight(module: Any) -> Tensor:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TensorUnbound(f"a {type(module).__name__} has no weight an adapter could change")
    return weight.data


def _fitting(path: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise TensorUnbound(f"{path}: a tensor of the adapter is {list(tensor.shape)}, the base needs {list(shape)}")
    return tensor


def _embed_scale(module: Any) -> float:
    """What a scaled embedding multiplies its rows by, rounded as it rounds it; 1 for everything else."""
    scale = getattr(module, "embed_scale", None)
    if scale is None or not isinstance(module, nn.Embedding):
        return 1.0
    return float(scale.to(module.weight.dtype)) if isinstance(scale, Tensor) else float(scale)


def _kinds(given: Given) -> str:
    return ", ".join(sorted({f"{kind} ({parameter})" for kind, parameter in given}))
