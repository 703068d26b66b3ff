"""What a sweep knows of its cells, on disk: a finished cell is one JSON file named by what it is made of.

OUT/cells/<key>.json       finished cells: recipe, data, measurements, scores; shared by all plans with this OUT
OUT/work/…                 data, weights, half-done cells; not for keeping
key = SHA-256 of (resolved recipe, base, data sets, task), its first 20 digits
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.sweep.plan import Cell

_FORMAT = 1
_NAMES_ONLY = ("name", "source", "when")  # what a recipe is called changes nothing


@dataclass(frozen=True)
class TaskData:
    """A task's files."""

    train: Path
    evaluation: Path
    train_digest: str
    evaluation_digest: str


@dataclass(frozen=True)
class Records:
    """The files of one sweep."""

    out: Path

    @property
    def work(self) -> Path:
        """For what is not kept."""
        return self.out / "work"

    def key(self, cell: Cell, base: str, data: TaskData) -> str:
        """The name of a cell: equal for what would give equal results. `base` is the base's fingerprint."""
        recipe = {name: value for name, value in cell.recipe.as_dict().items() if name not in _NAMES_ONLY}
        made_of = [_FORMAT, recipe, base, cell.task, data.train_digest, data.evaluation_digest]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:20]

    def base_key(self, task: str, quantization: str, base: str, data: TaskData) -> str:
        """The name of the untrained base's score."""
        made_of = [_FORMAT, "base", task, quantization, base, data.evaluation_digest]
        return "base-" + hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:20]

    def finished(self, key: str) -> dict[str, Any] | None:
        """What a finished cell measured, or None."""
        return _read(self.out / "cells" / f"{key}.json")

    def finish(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a cell's record."""
        _write(self.out / "cells" / f"{key}.json", record)

    def trained(self, key: str) -> dict[str, Any] | None:
        """What a cell's training measured, where its weights are there still, or None."""
        return _read(self.work / f"{key}.json") if self.weights(key).is_dir() else None

    def weights(self, key: str) -> Path:
        """The adapter or model that a cell's training wrote."""
        return self.work / key


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    return value


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(value, sort_keys=True) + "\n", "utf-8")
    aside.replace(path)
