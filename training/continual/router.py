"""Fits the router that picks an adapter from the prompt alone; what it is and how it chooses: `server/router.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from server.config import Quantization
from server.errors import RouterInvalid
from server.router import Router
from training import output

_HELD = 4  # every fourth prompt of a task is held out for its threshold
LEAST_PROMPTS = 12  # prompts of a task, so that some can be held out
_SHRINK = 0.1  # towards an even covariance: few prompts say little of one


def fit(
    embeddings: Mapping[str, Tensor],
    layer: int,
    base: str | None = None,
    quantization: Quantization = "none",
    miss: float = 0.05,
    width: int = 64,
) -> Router:
    """A router over tasks, by the adapter that each stands for; embeddings are [prompts, d], in any order.

    They come from `layer` of the base with the fingerprint `base`, held in `quantization`, and the router is for that.
    Every fourth prompt of a task is held out and sets its threshold: the distance that all but `miss` of them keep.
    `width` bounds p. Raises `RouterInvalid` for fewer than two tasks or too few prompts.
    """
    if len(embeddings) < 2:
        raise RouterInvalid("a router chooses between at least two tasks")
    if few := [name for name, rows in embeddings.items() if len(rows) < LEAST_PROMPTS]:
        raise RouterInvalid(f"{few[0]} has fewer than {LEAST_PROMPTS} prompts")
    if not 0 < miss < 1:
        raise RouterInvalid(f"miss lies between 0 and 1, not at {miss}")
    held = {name: rows.double()[::_HELD] for name, rows in embeddings.items()}
    kept = {name: rows.double()[[i for i in range(len(rows)) if i % _HELD]] for name, rows in embeddings.items()}
    everything = torch.cat(list(kept.values()))
    mean = everything.mean(dim=0)
    # Hidden states have a few features far larger than all others; each is measured by its spread within tasks, or the
    # shrinkage below would be all about those few.
    within = torch.cat([rows - rows.mean(dim=0) for rows in kept.values()]).square().mean(dim=0).sqrt()
    scale = within.clamp(min=1e-6 * float(within.max().clamp(min=1e-12)))
    _, _, directions = torch.linalg.svd((everything - mean) / scale, full_matrices=False)
    axes = directions[: min(width, len(everything) - len(kept))].T / scale[:, None]  # [d, p]
    placed = {name: (rows - mean) @ axes for name, rows in kept.items()}
    centred = torch.cat([rows - rows.mean(dim=0) for rows in placed.values()])
    covariance = centred.T @ centred / max(1, len(centred) - len(placed))
    even = covariance.diagonal().mean().clamp(min=1e-12)
    covariance = (1 - _SHRINK) * covariance + _SHRINK * even * torch.eye(len(covariance), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    whitening = axes @ (vectors / values.clamp(min=1e-12).sqrt())
    centroids = torch.stack([((rows - mean) @ whitening).mean(dim=0) for rows in kept.values()])
    thresholds = [
        _quantile(((rows - mean) @ whitening - centre).square().sum(dim=1), 1 - miss)
        for rows, centre in zip(held.values(), centroids, strict=True)
    ]
    return Router(
        tuple(embeddings), layer, base, quantization, miss, mean.float(), whitening.float(), centroids.float(),
        torch.tensor(thresholds, dtype=torch.float32),
    )  # fmt: skip


def write_router(router: Router, directory: Path) -> None:
    """Fill `directory`, which is not there yet, with the router; raises `OutputExists` where it is."""
    output.check_free(directory)
    output.write_directory(directory, router.save)


def _quantile(distances: Tensor, share: float) -> float:
    """The smallest distance that at least `share` of those held out keep; calibrated for one prompt more.

    With m held-out prompts the k-th smallest, k = ⌈(m + 1) share⌉, is exceeded by a new prompt of the task with a
    chance of at most 1 - share (split conformal prediction); where m is too small for that it is the largest.
    """
    ordered = distances.sort().values
    k = min(len(ordered), int(-(-(len(ordered) + 1) * share // 1)))
    return float(ordered[k - 1])
