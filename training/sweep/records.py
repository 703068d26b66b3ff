"""What a sweep knows of its cells, on disk: a finished cell is one JSON file named by what it is made of.

OUT/cells/<key>.json       finished cells: recipe, data, measurements, scores; shared by all plans with this OUT
OUT/work/…                 data, weights, half-done cells; not for keeping
key = SHA-256 of (resolved recipe, base, data sets, task), its first 20 digits
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.cells import Cells, key_of, made_of_recipe, read_json
from training.errors import CellTaken
from training.lock import held
from training.sweep.plan import Cell

_FORMAT = 1


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
        recipe = made_of_recipe(cell.recipe.as_dict())
        return key_of([_FORMAT, recipe, base, cell.task, data.train_digest, data.evaluation_digest])

    def base_key(self, task: str, quantization: str, base: str, data: TaskData) -> str:
        """The name of the untrained base's score."""
        return "base-" + key_of([_FORMAT, "base", task, quantization, base, data.evaluation_digest])

    def finished(self, key: str) -> dict[str, Any] | None:
        """What a finished cell measured, or None."""
        return Cells(self.out / "cells").finished(key)

    def finish(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a cell's record."""
        Cells(self.out / "cells").finish(key, record)

    def trained(self, key: str) -> dict[str, Any] | None:
        """What a cell's training measured, where its weights are there still, or None."""
        return read_json(self.work / f"{key}.json") if self.weights(key).is_dir() else None

    def alone(self, key: str) -> AbstractContextManager[None]:
        """Hold a cell for this process; raises `CellTaken` where another one does."""
        return held(self.work / "locks" / key, CellTaken(f"another process is at the cell {key} of {self.out}"))

    def weights(self, key: str) -> Path:
        """The adapter or model that a cell's training wrote."""
        return self.work / key
