"""The examples of a plan's tasks, as files: the plan's own, or built once into the run's directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.build import CARD, build_task
from training.continual.plan import ContinualPlan, TaskPlan
from training.data import Dataset, digest_of, read_jsonl
from training.errors import DataInvalid


@dataclass(frozen=True)
class TaskData:
    """A task's examples."""

    label: str
    train: Dataset
    evaluation: Dataset
    train_file: Path
    eval_file: Path


def prepare_data(plan: ContinualPlan, directory: Path) -> tuple[TaskData, ...]:
    """Every task's files, built where they are not there yet, or are of another size; raises what that raises.

    Where a run has begun in `directory` it is one of this plan, see `RunRecord.check_plan`.
    """
    found = []
    for task in plan.tasks:
        if task.train_file is not None and task.eval_file is not None:
            train, held = plan.directory / task.train_file, plan.directory / task.eval_file
        else:
            place = directory / "data" / task.label
            train, held = place / "train.jsonl", place / "eval.jsonl"
            if not _is_built(task, place, plan.recipe.seed):
                beside = place.with_name(f".{task.label}.partial")
                shutil.rmtree(beside, ignore_errors=True)
                build_task(task.task, beside, task.train, task.evaluation, plan.recipe.seed)
                shutil.rmtree(place, ignore_errors=True)
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


def text_digests(plan: ContinualPlan) -> dict[str, str]:
    """Of the plan's texts that are no task's, by their keys in it. Raises `DataInvalid` where one cannot be read."""
    named = {"text": plan.text, "keep_text": plan.keep_text}
    return {key: digest_of(_bytes(plan, key, name)) for key, name in named.items() if name is not None}


def text_of(plan: ContinualPlan, key: str, name: str | None) -> str | None:
    """The text that the plan's `key` names, if any; raises `DataInvalid`."""
    if name is None:
        return None
    try:
        return _bytes(plan, key, name).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataInvalid(f"{key}: {name} is not UTF-8 (byte {error.start})") from error


def _bytes(plan: ContinualPlan, key: str, name: str) -> bytes:
    try:
        return (plan.directory / name).read_bytes()
    except OSError as error:
        raise DataInvalid(f"{key}: cannot read {name}: {error.strerror}; paths start where the plan lies") from error


def _is_built(task: TaskPlan, place: Path, seed: int) -> bool:
    """Whether the task's files are there and are those that the plan asks for, by the card beside them."""
    if not place.is_dir():
        return False
    try:
        card = json.loads((place / CARD).read_text("utf-8"))
        made = [card["task"], card["seed"], *(card["files"][f"{part}.jsonl"]["examples"] for part in ("train", "eval"))]
    except (OSError, ValueError, KeyError, TypeError):
        return True  # none of ours says otherwise
    return made == [task.task, seed, task.train, task.evaluation]
