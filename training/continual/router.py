"""Picks an adapter from the prompt alone: which task's prompts it is most like, or none of them.

A prompt is the mean of the frozen base's own hidden states over its tokens, at a middle layer, so that nothing is
loaded but the base. Tasks are Gaussians with one covariance between them (linear discriminant analysis, Fisher 1936):
prompts are projected so that this covariance is the identity, and go to the nearest task's mean. Where even that is
farther away than all but `miss` of the task's own held-out prompts are, the answer is None: the base.

A router on disk is router.json (what it is, for which base, the adapters' names) and router.safetensors:

    mean        [d]       subtracted from an embedding
    projection  [d, p]    to where distances are Mahalanobis distances
    centroids   [n, p]    one a task
    thresholds  [n]       squared distances beyond which a prompt is no task's
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import output
from training.continual.errors import RouterInvalid

SCHEMA: Final = "loraplex.router/1"
_SETTINGS, _TENSORS = "router.json", "router.safetensors"
_HELD = 4  # every fourth prompt of a task is held out for its threshold
_LEAST = 12  # prompts of a task, so that some can be held out
_SHRINK = 0.1  # towards an even covariance: few prompts say little of one


@dataclass(frozen=True)
class Choice:
    """A routing decision."""

    adapter: str | None  # None: the base
    nearest: str  # whose prompts it is most like, chosen or not
    distance: float  # squared, in units of the tasks' own spread
    threshold: float  # of the nearest


@dataclass(frozen=True)
class Router:
    """A fitted router; deciding needs an embedding and four small tensors."""

    names: tuple[str, ...]  # what is chosen, one a task: adapter references
    layer: int  # whose output is averaged, counted from 0 (the embedding)
    base: str | None  # the base's fingerprint, where known
    miss: float  # share of a task's own prompts that may go to the base
    mean: Tensor
    projection: Tensor
    centroids: Tensor
    thresholds: Tensor

    def choose(self, embedding: Tensor) -> Choice:
        """The adapter for a prompt's embedding [d]; raises ValueError where that is of another size or not finite."""
        if embedding.shape != self.mean.shape or not bool(torch.isfinite(embedding).all()):
            raise ValueError(f"an embedding has {self.mean.numel()} finite numbers")
        point = (embedding.float() - self.mean) @ self.projection
        distances = (self.centroids - point).square().sum(dim=1)
        index = int(distances.argmin())
        distance, threshold = float(distances[index]), float(self.thresholds[index])
        name = self.names[index]
        return Choice(name if distance <= threshold else None, name, distance, threshold)

    def write(self, directory: Path) -> None:
        """Fill `directory`, which is not there yet, with the router."""
        settings = {"schema": SCHEMA, "names": list(self.names), "layer": self.layer, "base": self.base,
                    "miss": self.miss}  # fmt: skip

        def save(place: Path) -> None:
            (place / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
            tensors = {name: getattr(self, name).float().contiguous() for name in _SHAPES}
            save_file(tensors, place / _TENSORS)

        output.check_free(directory)
        output.write_directory(directory, save)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The router in `directory`; raises `RouterInvalid` for anything that is not one."""
        try:
            told = json.loads((directory / _SETTINGS).read_text("utf-8"))
            tensors = load_file(directory / _TENSORS)
            if told.pop("schema") != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            names = tuple(told.pop("names"))
            _check(names, tensors)
            return cls(names=names, **told, **tensors)
        except RouterInvalid:
            raise
        except Exception as error:  # json, safetensors and missing keys each have their own
            raise RouterInvalid(f"{directory.name} is no router: {error}") from error


_SHAPES: Mapping[str, str] = {"mean": "d", "projection": "dp", "centroids": "np", "thresholds": "n"}


def fit(
    embeddings: Mapping[str, Tensor], layer: int, base: str | None = None, miss: float = 0.05, width: int = 64
) -> Router:
    """A router over tasks, by the adapter that each stands for; embeddings are [prompts, d], in any order.

    Every fourth prompt of a task is held out and sets its threshold: the distance that all but `miss` of them keep.
    `width` bounds p. Raises `RouterInvalid` for fewer than two tasks or too few prompts.
    """
    if len(embeddings) < 2:
        raise RouterInvalid("a router chooses between at least two tasks")
    if few := [name for name, rows in embeddings.items() if len(rows) < _LEAST]:
        raise RouterInvalid(f"{few[0]} has fewer than {_LEAST} prompts")
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
        tuple(embeddings), layer, base, miss, mean.float(), whitening.float(), centroids.float(),
        torch.tensor(thresholds, dtype=torch.float32),
    )  # fmt: skip


def embed(model: Any, prompts: Sequence[Sequence[int]], layer: int) -> Tensor:
    """The prompts' embeddings [n, d] from a transformers model, one by one, nothing padded; `layer` counts from 0."""
    rows = []
    model.eval()
    with torch.inference_mode():
        for ids in prompts:
            states = model.base_model(
                input_ids=torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True
            ).hidden_states
            rows.append(states[layer][0].float().mean(dim=0))
    return torch.stack(rows)


def middle_layer(config: Any) -> int:
    """The layer whose states are averaged where nothing else is asked for, from a model's transformers config."""
    return int(config.get_text_config().num_hidden_layers) // 2


def _quantile(distances: Tensor, share: float) -> float:
    """The smallest distance that at least `share` of those held out keep; calibrated for one prompt more.

    With m held-out prompts the k-th smallest, k = ⌈(m + 1) share⌉, is exceeded by a new prompt of the task with a
    chance of at most 1 - share (split conformal prediction); where m is too small for that it is the largest.
    """
    ordered = distances.sort().values
    k = min(len(ordered), int(-(-(len(ordered) + 1) * share // 1)))
    return float(ordered[k - 1])


def _check(names: tuple[Any, ...], tensors: Mapping[str, Tensor]) -> None:
    if len(names) < 2 or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise RouterInvalid("a router's names are at least two different texts")
    if tensors.keys() != _SHAPES.keys():
        raise RouterInvalid(f"a router's tensors are {', '.join(_SHAPES)}")
    d, p = tensors["projection"].shape
    sizes = {"d": d, "p": p, "n": len(names)}
    for name, letters in _SHAPES.items():
        wanted = tuple(sizes[letter] for letter in letters)
        if tuple(tensors[name].shape) != wanted or tensors[name].dtype != torch.float32:
            raise RouterInvalid(f"a router's {name} is float32 {list(wanted)}, not {list(tensors[name].shape)}")
        if not bool(torch.isfinite(tensors[name]).all()):
            raise RouterInvalid(f"a router's {name} is not finite")
