"""A full fine-tune as a LoRA: the best rank-r approximation of what it changed, and how far off that is.

    Δ = W_full − W_base = U S Vᵀ        B = U_r √S_r   A = √S_r V_rᵀ        error = ‖Δ − B A‖ / ‖Δ‖

By the theorem of Eckart and Young no other product of rank r is nearer in Frobenius norm. Only linear layers of the
decoder get a LoRA; what training moved elsewhere (embedding, head, norms, biases) is lost and counted as error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hub.model_dir import INDEX_FILE
from training.errors import ExtractionImpossible

_NOT_LINEAR = ("embed", "wte", "wpe", "lm_head", "norm", "ln_")
Report = Callable[[int, int], object]  # weights done, weights in all


@dataclass(frozen=True)
class LayerError:
    """One linear layer."""

    module: str  # "model.layers.0.self_attn.q_proj"
    delta_norm: float  # ‖Δ‖, Frobenius
    weight_norm: float  # ‖W_base‖
    error: float  # ‖Δ − B A‖ / ‖Δ‖, 0 where Δ is 0


@dataclass(frozen=True)
class Extraction:
    """A LoRA made of a difference."""

    rank: int
    layers: tuple[LayerError, ...]
    left_out_norm: float  # ‖Δ‖ of everything that gets no LoRA
    factors: Mapping[str, tuple[Tensor, Tensor]]  # module → (A [r, in], B [out, r]), float32

    @property
    def linear_error(self) -> float:
        """‖Δ − B A‖ / ‖Δ‖ over all the linear layers together."""
        lost = sum((layer.error * layer.delta_norm) ** 2 for layer in self.layers)
        return math.sqrt(lost / max(sum(layer.delta_norm**2 for layer in self.layers), 1e-300))

    @property
    def error(self) -> float:
        """The same over everything that changed, what has no LoRA included."""
        squares = sum(layer.delta_norm**2 for layer in self.layers)
        lost = sum((layer.error * layer.delta_norm) ** 2 for layer in self.layers)
        left_out = self.left_out_norm**2
        return math.sqrt((lost + left_out) / max(squares + left_out, 1e-300))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a facts file; errors by layer under their modules' names."""
        return {
            "rank": self.rank,
            "relative_error": self.error,
            "relative_error_of_linears": self.linear_error,
            "norm_without_lora": self.left_out_norm,
            "relative_error_by_module": {layer.module: layer.error for layer in self.layers},
        }


def extract(base: Path, full: Path, rank: int, report: Report = lambda done, total: None) -> Extraction:
    """The LoRA of `rank` nearest to what the model in `full` changed of the one in `base` (both *.safetensors).

    Weights are read one at a time, in float32. Raises `ExtractionImpossible` where the two are not models of the same
    shapes, nothing differs, or `rank` is larger than a weight's smaller side.
    """
    layers, factors, left_out = [], {}, 0.0
    with ExitStack() as stack:
        before, after = (_Weights(stack, directory) for directory in (base, full))
        names = sorted(before.names | after.names)
        for done, name in enumerate(names):
            report(done, len(names))
            if name not in before.names or name not in after.names:
                if name.endswith("lm_head.weight"):
                    continue  # tied to the embedding, which is compared
                raise ExtractionImpossible(f"{name} is in one of the two models only")
            was, now = before.read(name), after.read(name)
            if was.shape != now.shape:
                raise ExtractionImpossible(
                    f"{name} is {list(was.shape)} in the base and {list(now.shape)} in the model"
                )
            delta = now - was
            if not _is_linear(name, delta):
                left_out += float(delta.double().square().sum())
                continue
            module = name.removesuffix(".weight")
            if rank > min(delta.shape):
                raise ExtractionImpossible(f"rank {rank} is more than {module} of {list(delta.shape)} can have")
            a, b = low_rank(delta, rank)
            norm = float(delta.norm())
            error = float((delta - b @ a).norm()) / norm if norm else 0.0
            layers.append(LayerError(module, norm, float(was.norm()), error))
            factors[module] = (a, b)
    if not any(layer.delta_norm for layer in layers):
        raise ExtractionImpossible("the two models have the same linear layers, so there is nothing to extract")
    return Extraction(rank, tuple(layers), math.sqrt(left_out), factors)


def low_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [rank, in], B [out, rank]) with B A the best approximation of `delta` [out, in] of that rank."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * vt[:rank], u[:, :rank] * root


def adapter_files(extraction: Extraction, base: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, tensors) as PEFT reads them; alpha is the rank, so the delta is B A itself."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": extraction.rank,
        "lora_alpha": extraction.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({module.rpartition(".")[2] for module in extraction.factors}),
    }
    tensors = {}
    for module, (a, b) in extraction.factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    return config, tensors


class _Weights:
    """All tensors of a model's directory, opened and not read."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self._files = {}
        for path in _weight_files(directory):
            file = stack.enter_context(safe_open(str(path), framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor.float()


def _weight_files(directory: Path) -> Iterator[Path]:
    index = directory / INDEX_FILE
    if index.is_file():
        names = sorted({Path(name).name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
        yield from (directory / name for name in names)
        return
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise ExtractionImpossible(f"{directory} holds no *.safetensors")
    yield from found


def _is_linear(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and name.endswith(".weight") and not any(part in name for part in _NOT_LINEAR)
