"""Task adapters made one: TIES and the largest magnitude, on ΔW rather than on the factors.

PEFT's `add_weighted_adapter` with "ties" merges A and B apart from each other, which is a merge of no ΔW; its
"ties_svd" does what is meant but leaves the result in a loaded model, without the error that the rank costs. The
elementwise part below is PEFT's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from training.continual.errors import FactorsUnsupported
from training.continual.factors import Factors, Pair, nearest

How = Literal["ties", "magnitude"]
HOWS: tuple[How, ...] = ("ties", "magnitude")


@dataclass(frozen=True)
class Merged:
    """Several adapters as one."""

    factors: dict[str, Pair]
    error: float  # ‖what the rank leaves out‖ / ‖the merged ΔW‖, over all modules


def merge(adapters: Sequence[Factors], how: How, rank: int, density: float = 0.2) -> Merged:
    """One adapter of `rank` from several of the same modules.

    "ties" (Yadav et al. 2023, arXiv:2306.01708): of each ΔW the `density` largest entries stay, each entry's sign is
    elected by the sum, and the entries that agree with it are averaged. "magnitude": of each entry the largest value of
    all, by magnitude.
    """
    if not adapters or any(one.keys() != adapters[0].keys() for one in adapters):
        raise FactorsUnsupported("merging needs adapters of the same modules")
    found, size, lost = {}, 0.0, 0.0
    for module in adapters[0]:
        whole = merged_delta([one[module].delta() for one in adapters], how, density)
        found[module], error = nearest(whole, rank)
        norm = float(whole.double().square().sum())
        size, lost = size + norm, lost + norm * error**2
    return Merged(found, (lost / size) ** 0.5 if size else 0.0)


def merged_delta(deltas: Sequence[Tensor], how: How, density: float) -> Tensor:
    """The merged matrix [out, in], see `merge`."""
    if how == "magnitude":
        stacked = torch.stack(list(deltas))
        return stacked.gather(0, stacked.abs().argmax(dim=0, keepdim=True))[0]
    from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune

    kept = torch.stack([prune(delta, density, method="magnitude") if density < 1 else delta for delta in deltas])
    merged: Tensor = disjoint_merge(kept, calculate_majority_sign_mask(kept))
    return merged
