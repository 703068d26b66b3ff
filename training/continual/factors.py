"""An adapter as what it adds: one low-rank product a matrix, and the arithmetic that continual strategies do on them.

    ΔW = b a        W [out, in]   a [r, in]   b [out, r]   float32

The scale alpha/r is folded into b, so that factors of different recipes can be added, joined and compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hub.adapter_dir import parse_adapter
from training.continual.errors import FactorsUnsupported

_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HARMLESS = {"rslora", "rank_pattern", "alpha_pattern"}


@dataclass(frozen=True)
class Pair:
    """The factors of one matrix."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r], the scale included

    @property
    def rank(self) -> int:
        """Columns of b."""
        return self.b.shape[1]

    def delta(self) -> Tensor:
        """ΔW [out, in]."""
        return self.b @ self.a

    def norm(self) -> float:
        """‖ΔW‖, Frobenius, without forming ΔW."""
        a, b = self.a.double(), self.b.double()
        return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


Factors = Mapping[str, Pair]  # by module: "model.layers.0.self_attn.q_proj"


def read_factors(directory: Path) -> dict[str, Pair]:
    """The factors of the PEFT LoRA in `directory`.

    Raises what `hub.adapter_dir.parse_adapter` raises, and `FactorsUnsupported` where the adapter is more than
    low-rank deltas (DoRA, biases, trained tokens, modules saved whole).
    """
    parsed = parse_adapter(directory)
    if strange := sorted(set(parsed.config.features) - _HARMLESS):
        raise FactorsUnsupported(
            f"{directory.name} has {', '.join(strange)}; only plain low-rank deltas can be combined"
        )
    tensors = load_file(directory / _WEIGHTS)
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, dot, half = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not dot or half not in ("A.weight", "B.weight"):
            raise FactorsUnsupported(f"{directory.name} has the tensor {name}, which is no factor of a linear layer")
        halves.setdefault(module, {})[half[0]] = tensor.float()
    return {
        module: Pair(two["A"], two["B"] * parsed.config.scaling(module, two["A"].shape[0]))
        for module, two in sorted(halves.items())
    }


def write_factors(directory: Path, factors: Factors, base: str) -> int:
    """Fill `directory` with the factors as an ordinary PEFT LoRA of scale 1; returns the bytes of its tensors.

    `base` is the name that the config records. Ranks may differ from module to module.
    """
    ranks = {module: pair.rank for module, pair in factors.items()}
    common = max(set(ranks.values()), key=lambda rank: (sum(one == rank for one in ranks.values()), rank))
    other = {module: rank for module, rank in ranks.items() if rank != common}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for module, pair in factors.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = pair.a.float().contiguous()
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = pair.b.float().contiguous()
    save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def joined(first: Factors, second: Factors) -> dict[str, Pair]:
    """The sum of two adapters, exactly: their factors side by side; the ranks add up."""
    _same_modules(first, second)
    return {
        module: Pair(torch.cat([pair.a, second[module].a]), torch.cat([pair.b, second[module].b], dim=1))
        for module, pair in first.items()
    }


def compressed(pair: Pair, rank: int) -> tuple[Pair, float]:
    """(the nearest product of at most `rank`, ‖what it leaves out‖ / ‖ΔW‖), by SVD of the small core.

    With b = Qb Rb and aᵀ = Qa Ra, the singular values of ΔW are those of Rb Raᵀ [r, r]; singular values are shared
    equally between the two factors.
    """
    qb, rb = torch.linalg.qr(pair.b.double())
    qa, ra = torch.linalg.qr(pair.a.double().T)
    u, s, vt = torch.linalg.svd(rb @ ra.T)
    kept = min(rank, s.numel())
    total, lost = float(s.square().sum()), float(s[kept:].square().sum())
    root = s[:kept].sqrt()
    near = Pair((root[:, None] * (vt[:kept] @ qa.T)).float(), (qb @ u[:, :kept] * root).float())
    return near, (lost / total) ** 0.5 if total else 0.0


def nearest(delta: Tensor, rank: int) -> tuple[Pair, float]:
    """(the nearest product of `rank` to a whole matrix [out, in], the relative error), by SVD."""
    u, s, vt = torch.linalg.svd(delta.double(), full_matrices=False)
    kept = min(rank, s.numel())
    total, lost = float(s.square().sum()), float(s[kept:].square().sum())
    root = s[:kept].sqrt()
    pair = Pair((root[:, None] * vt[:kept]).float(), (u[:, :kept] * root).float())
    return pair, (lost / total) ** 0.5 if total else 0.0


def relative_difference(first: Factors, second: Factors) -> float:
    """‖Δ₁ − Δ₂‖ / ‖Δ₁‖ over all modules."""
    _same_modules(first, second)
    apart = {module: Pair(torch.cat([p.a, second[module].a]), torch.cat([p.b, -second[module].b], 1))
             for module, p in first.items()}  # fmt: skip
    size = sum(pair.norm() ** 2 for pair in first.values()) ** 0.5
    apart_size = sum(pair.norm() ** 2 for pair in apart.values()) ** 0.5
    return float(apart_size / max(size, 1e-30))


def _same_modules(first: Factors, second: Factors) -> None:
    if first.keys() != second.keys():
        apart = sorted(first.keys() ^ second.keys())
        raise FactorsUnsupported(f"the adapters adapt different modules: {', '.join(apart[:3])} only in one of them")
