"""A task's data sets as files, with a card that says what they are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data import write_jsonl
from training.tasks import task_named

CARD = "dataset.json"


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
