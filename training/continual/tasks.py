"""The examples of a plan's tasks, as files: the plan's own, or built once into the run's directory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.build import build_task
from training.continual.plan import ContinualPlan
from training.data import Dataset, read_jsonl


@dataclass(frozen=True)
class TaskData:
    """A task's examples."""

    label: str
    train: Dataset
    evaluation: Dataset
    train_file: Path
    eval_file: Path


def prepare_data(plan: ContinualPlan, directory: Path) -> tuple[TaskData, ...]:
    """Every task's files, built where they are not there yet. Raises what building and reading raise."""
    found = []
    for task in plan.tasks:
        if task.train_file is not None and task.eval_file is not None:
            train, held = plan.directory / task.train_file, plan.directory / task.eval_file
        else:
            place = directory / "data" / task.label
            train, held = place / "train.jsonl", place / "eval.jsonl"
            if not place.is_dir():
                beside = place.with_name(f".{task.label}.partial")
                shutil.rmtree(beside, ignore_errors=True)
                build_task(task.task, beside, task.train, task.evaluation, plan.recipe.seed)
                beside.rename(place)
        found.append(TaskData(task.label, read_jsonl(train), read_jsonl(held), train, held))
    return tuple(found)


def digests(data: Sequence[TaskData]) -> dict[str, str]:
    """Of every file, by what it is: "sentiment/train", "sentiment/eval", …"""
    return {
        f"{task.label}/{part}": dataset.digest
        for task in data
        for part, dataset in (("train", task.train), ("eval", task.evaluation))
    }
