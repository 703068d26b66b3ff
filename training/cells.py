"""Finished work as files: one JSON file for each cell of an experiment, named by what the cell is made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

NAMES_ONLY: Final = ("name", "source", "when")  # what a recipe is called changes nothing


def key_of(made_of: Any) -> str:
    """The name of a cell: equal for what is made of equal parts, which are plain JSON values."""
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:20]


def made_of_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe, as `Recipe.as_dict` gives it, decides what comes out."""
    return {name: value for name, value in recipe.items() if name not in NAMES_ONLY}


@dataclass(frozen=True)
class Cells:
    """A directory of finished cells."""

    directory: Path

    def finished(self, key: str) -> dict[str, Any] | None:
        """What a finished cell holds, or None."""
        return read_json(self.directory / f"{key}.json")

    def finish(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a cell's record."""
        write_json(self.directory / f"{key}.json", record)


def read_json(path: Path) -> dict[str, Any] | None:
    """What the file holds, None where there is none."""
    try:
        value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace the file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(value, sort_keys=True) + "\n", "utf-8")
    aside.replace(path)
