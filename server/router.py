"""Picks an adapter from the prompt alone: which task's prompts it is most like, or none of them.

A prompt is the mean of the frozen base's own hidden states over its tokens, after `layer` layers, so that nothing is
loaded but the base. Tasks are Gaussians with one covariance between them (linear discriminant analysis, Fisher 1936):
prompts are projected so that this covariance is the identity, and go to the nearest task's mean. Where even that is
farther away than all but `miss` of the task's own held-out prompts are, the answer is None: the base.

A router on disk is router.json (what it is, for which base in which precision, the adapters' names) and
router.safetensors:

    mean        [d]       subtracted from an embedding
    projection  [d, p]    to where distances are Mahalanobis distances
    centroids   [n, p]    one a task
    thresholds  [n]       squared distances beyond which a prompt is no task's

`training/continual/router.py` fits them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hub.refs import AdapterRef
from server.config import Quantization
from server.errors import RouterInvalid
from server.router_files import SETTINGS, TENSORS, check_directory

SCHEMA: Final = "loraplex.router/1"
_SHAPES: Mapping[str, str] = {"mean": "d", "projection": "dp", "centroids": "np", "thresholds": "n"}


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
    quantization: Quantization  # how the base was held when it read what the router was fitted on
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

    def save(self, directory: Path) -> None:
        """Write the router's two files into `directory`."""
        settings = {"schema": SCHEMA, "names": list(self.names), "layer": self.layer, "base": self.base,
                    "quantization": self.quantization, "miss": self.miss}  # fmt: skip
        (directory / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
        save_file({name: getattr(self, name).float().contiguous() for name in _SHAPES}, directory / TENSORS)

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The router in `directory`; raises `RouterInvalid` for anything that is not one."""
        check_directory(directory)
        try:
            told = json.loads((directory / SETTINGS).read_text("utf-8"))
            tensors = load_file(directory / TENSORS)
            if told.pop("schema") != SCHEMA:
                raise ValueError(f"its schema is not {SCHEMA}")
            names = tuple(told.pop("names"))
            _check(names, tensors)
            for name in names:
                AdapterRef.parse(name)
            if type(told["layer"]) is not int or not isinstance(told["base"], str | None):
                raise ValueError("its layer is a number, and its base a fingerprint or null")
            told.setdefault("quantization", "none")  # all were, before it was written down
            if told["quantization"] not in get_args(Quantization):
                raise ValueError(f"its quantization is one of {', '.join(get_args(Quantization))}")
            return cls(names=names, **told, **tensors)
        except RouterInvalid:
            raise
        except Exception as error:  # json, safetensors and missing keys each have their own
            raise RouterInvalid(f"{directory.name} is no router: {error}") from error


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
