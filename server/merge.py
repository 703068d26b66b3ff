"""Base + adapters as one ordinary model, in full precision.

The base is read from disk in float32 (never the quantized one that serves: merging into 4 bits and back loses about
a quarter of the update), the updates are added up in float64, and the result is an ordinary transformers directory.

For a linear layer with weight W and adapters i of weight w_i and scaling s_i:  W + sum_i w_i s_i B_i A_i.
A DoRA adapter with magnitude m:  m / |W + s B A| * (W + s B A), norms by output row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hub.lora_config import LoraConfig, parse_tensor_name
from hub.tensor_names import Kind
from server.errors import TensorUnbound, UnsupportedAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class MergePart:
    """One adapter of a merge, as a PEFT directory the hub has accepted."""

    name: str  # "team/sentiment@3", for messages
    directory: Path
    weight: float = 1.0  # finite; factor on the adapter's delta
    digest: str | None = None  # of its manifest; None: it comes from no hub


@dataclass(frozen=True)
class _Parsed:
    part: MergePart
    config: LoraConfig
    modules: dict[str, dict[tuple[Kind, str], Tensor]]  # module path -> its tensors, by kind and parameter


def merge_into(model: PreTrainedModel, parts: Sequence[MergePart]) -> int:
    """Add the adapters to a float32 `model` in place; the number of modules changed.

    An embedding that is tied to the output head is untied first when an adapter changes only one of the two.
    Raises `UnsupportedAdapter` for what has no merged form (also: whatever replaces a value instead of adding to it,
    when the adapter is not alone at weight 1), `TensorUnbound` for a tensor that fits no module of the model.
    """
    parsed = [_parse(part) for part in parts]
    alone = len(parsed) == 1 and parsed[0].part.weight == 1.0
    for adapter in parsed:
        _refuse_unmergeable(adapter, alone)
    touched = {module for adapter in parsed for module in adapter.modules}
    _untie(model, touched)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for path in sorted(touched):
            if path not in modules:
                owners = ", ".join(adapter.part.name for adapter in parsed if path in adapter.modules)
                raise TensorUnbound(f"{owners} changes {path}, which this base does not have")
            _merge_module(modules[path], path, [adapter for adapter in parsed if path in adapter.modules])
    return len(touched)


def _parse(part: MergePart) -> _Parsed:
    config = LoraConfig.parse((part.directory / CONFIG_FILE).read_bytes())
    modules: dict[str, dict[tuple[Kind, str], Tensor]] = {}
    for key, tensor in load_file(part.directory / WEIGHTS_FILE).items():
        site = parse_tensor_name(key)
        modules.setdefault(site.module, {})[site.kind, site.parameter] = tensor
    return _Parsed(part, config, modules)


def _refuse_unmergeable(adapter: _Parsed, alone: bool) -> None:
    """Name what cannot be written into weights at all, or not together with others."""
    config, kinds = adapter.config, {kind for tensors in adapter.modules.values() for kind, _ in tensors}
    never = {
        "alora_invocation_tokens": config.alora_invocation_tokens is not None,  # depends on the position
        "target_parameters": bool(config.target_parameters),
        "trainable_token_indices": "trainable_tokens" in kinds,
    }
    only_alone = {
        "use_dora": config.use_dora,
        "modules_to_save or trained biases": bool(kinds & {"saved", "base"}),
    }
    for feature, used in never.items():
        if used:
            raise UnsupportedAdapter(f"{adapter.part.name} uses {feature}, which merge does not support")
    for feature, used in only_alone.items():
        if used and not alone:
            raise UnsupportedAdapter(
                f"{adapter.part.name} uses {feature}: it can be merged only alone and with weight 1"
            )


def _untie(model: PreTrainedModel, touched: Iterable[str]) -> None:
    """Give the output head a weight of its own when an adapter changes it or the embedding it is tied to."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    names = {name for name, module in model.named_modules() if module is embedding or module is head}
    if names.isdisjoint(touched):
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


def _merge_module(module: nn.Module, path: str, adapters: Sequence[_Parsed]) -> None:
    for adapter in adapters:
        for (kind, parameter), tensor in adapter.modules[path].items():
            if kind in ("saved", "base"):
                _replace(module, path, parameter, tensor, adapter)
    low_rank = [adapter for adapter in adapters if _has_pair(adapter, path)]
    if low_rank:
        weight = _parameter(module, path, "weight", low_rank[0])
        updated = weight.double()
        for adapter in low_rank:
            updated += _weight_delta(module, path, adapter, weight.shape)
        for adapter in low_rank:
            magnitude = adapter.modules[path].get(("magnitude", "weight"))
            if magnitude is not None:
                updated = _with_magnitude(module, path, updated, magnitude, adapter)
        weight.copy_(updated)
    for adapter in adapters:
        bias = adapter.modules[path].get(("lora_bias", "bias"))
        if bias is not None:
            rank = adapter.modules[path]["lora_A", "weight"].shape[0]
            target = _parameter(module, path, "bias", adapter)
            factor = adapter.part.weight * adapter.config.scaling(path, rank)
            target.copy_(target.double() + factor * _fitting(bias, target.shape, path, adapter).double())


def _has_pair(adapter: _Parsed, path: str) -> bool:
    kinds = {kind for kind, _ in adapter.modules[path]}
    for first, second in (("lora_A", "lora_B"), ("embedding_A", "embedding_B")):
        if (first in kinds) != (second in kinds):
            raise TensorUnbound(f"{adapter.part.name}: {path} has only one half of its low-rank pair")
    return bool(kinds & {"lora_A", "embedding_A"})


def _weight_delta(module: nn.Module, path: str, adapter: _Parsed, shape: torch.Size) -> Tensor:
    """weight x scaling x B A in the layout of the module's weight, float64."""
    tensors = adapter.modules[path]
    embedding = ("embedding_A", "weight") in tensors
    a = tensors["embedding_A" if embedding else "lora_A", "weight"].double()
    b = tensors["embedding_B" if embedding else "lora_B", "weight"].double()
    if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0]:
        raise TensorUnbound(f"{adapter.part.name}: {path} has factors {list(b.shape)} and {list(a.shape)}")
    delta = b @ a
    if embedding or _stores_inputs_first(module):
        delta = delta.T
    return _fitting(delta, shape, path, adapter) * (adapter.part.weight * adapter.config.scaling(path, a.shape[0]))


def _stores_inputs_first(module: nn.Module) -> bool:
    """Whether the weight is [in, out] as in transformers' Conv1D, not [out, in] as in nn.Linear."""
    return type(module).__name__ == "Conv1D"


def _with_magnitude(module: nn.Module, path: str, updated: Tensor, magnitude: Tensor, adapter: _Parsed) -> Tensor:
    if isinstance(module, nn.Embedding) or _stores_inputs_first(module):
        raise UnsupportedAdapter(f"{adapter.part.name} uses DoRA on {path}, which merge supports on linear layers only")
    norms = updated.norm(dim=1)
    factor: Tensor = _fitting(magnitude.double().flatten(), norms.shape, path, adapter) / norms
    return updated * factor.unsqueeze(1)


def _replace(module: nn.Module, path: str, parameter: str, tensor: Tensor, adapter: _Parsed) -> None:
    target = _parameter(module, path, parameter, adapter)
    target.copy_(_fitting(tensor, target.shape, path, adapter))


def _parameter(module: nn.Module, path: str, name: str, adapter: _Parsed) -> Tensor:
    parameter = getattr(module, name, None)
    if not isinstance(parameter, nn.Parameter):
        raise TensorUnbound(f"{adapter.part.name} changes the {name} of {path}, which this base does not have")
    return parameter.data


def _fitting(tensor: Tensor, shape: torch.Size, path: str, adapter: _Parsed) -> Tensor:
    if tensor.shape != shape:
        raise TensorUnbound(f"{adapter.part.name}: {path} is {list(shape)}, its update {list(tensor.shape)}")
    return tensor
