"""A task's data sets as files, with a card that says what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data import write_jsonl
from training.errors import OutputExists
from training.tasks import task_named

CARD = "dataset.json"


def card_beside(file: Path) -> Mapping[str, Any]:
    """What the dataset.json beside a data file says, where it tells of that file; else nothing, whatever lies there."""
    try:
        card = json.loads(file.with_name(CARD).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    files = card.get("files") if isinstance(card, dict) else None
    return card if isinstance(files, dict) and isinstance(files.get(file.name), dict) else {}


def check_own(task: str, out: Path) -> None:
    """Raise `OutputExists` where `out` holds files that a build of this task would replace and did not make."""
    card, data = out / CARD, [file for file in (out / "train.jsonl", *out.glob("eval*.jsonl")) if file.exists()]
    if not data and not card.exists():
        return
    if any(card_beside(file).get("task") != task for file in data or [card]):
        raise OutputExists(f"{out} holds files that no build of {task} made; choose another --out or remove them")


@dataclass(frozen=True)
class BuiltFiles:
    """What was written."""

    title: str
    card: dict[str, Any]  # the contents of dataset.json


def build_task(name: str, out: Path, train: int, evaluation: int, seed: int) -> BuiltFiles:
    """Write `out`/train.jsonl, eval.jsonl, the task's further evaluation sets, and dataset.json.

    Files of an earlier build are replaced. Raises `UnknownTask` and what the task's `build` raises.
    """
    task = task_named(name)
    built = task.build(train, evaluation, seed)
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {}
    for stem, examples in {"train": built.train, "eval": built.evaluation, **built.apart}.items():
        digest = write_jsonl(out / f"{stem}.jsonl", examples)
        files[f"{stem}.jsonl"] = {"examples": len(examples), "digest": digest}
    card = {
        "task": name,
        "seed": seed,
        "files": files,
        "provenance": built.provenance,
        "licence": built.licence,
    }
    (out / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return BuiltFiles(task.title, card)
