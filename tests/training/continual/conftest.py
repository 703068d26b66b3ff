"""Two little tasks as files, and a plan over them on the tiny base."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from hub.hub import Hub
from tests.training.continual.scripted import THREE, ScriptedScorer, ScriptedTrainer
from training.continual.plan import ContinualPlan
from training.continual.run import Run
from training.continual.tasks import prepare_data
from training.data import Example, write_jsonl

WORDS = {"first": ("positive", "negative"), "second": ("neutral", "mixed"), "third": ("positive", "mixed")}


def write_task(directory: Path, label: str, count: int = 24) -> None:
    examples = [Example.of(user=f"{label} {n % 5} {n}", answer=WORDS[label][n % 2]) for n in range(count)]
    write_jsonl(directory / f"{label}-train.jsonl", examples)
    write_jsonl(directory / f"{label}-eval.jsonl", examples[:4])


@pytest.fixture
def write_plan(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """write_plan(**changes) → the plan's file; tasks: first, second."""

    def write(labels: tuple[str, ...] = ("first", "second"), **changes: Any) -> Path:
        for label in labels:
            write_task(tmp_path, label)
        plan = {
            "name": "team/stream",
            "base": str(tiny_base),
            "set": {
                "rank": 4, "alpha": 8, "batch": 4, "epochs": 1, "learning_rate": 0.005, "max_length": 200,
                "dropout": 0.0, "hold_out": 0.1,
            },
            "seed": 3,
            "strategy": "sequential",
            "checkpoint_steps": 2,
            "tasks": [
                {
                    "task": "sentiment", "label": label, "train_file": f"{label}-train.jsonl",
                    "eval_file": f"{label}-eval.jsonl",
                }
                for label in labels
            ],
            **changes,
        }  # fmt: skip
        path = tmp_path / "plan.yaml"
        path.write_text(yaml.safe_dump(plan), "utf-8")
        return path

    return write


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub.open(str(tmp_path / "hub")) as opened:
        yield opened


@pytest.fixture
def make_run(write_plan: Callable[..., Path], tiny_base: Path, tmp_path: Path, hub: Hub) -> Callable[..., Run]:
    """make_run(scorer, directory name, **changes of the plan); `labels` of its tasks, three if not told."""

    def make(scorer: ScriptedScorer, place: str = "run", /, **changes: Any) -> Run:
        changes.setdefault("intruders", False)
        plan = ContinualPlan.read(write_plan(changes.pop("labels", THREE), **changes))
        directory = tmp_path / place
        directory.mkdir(exist_ok=True)
        trainer: Any = ScriptedTrainer(tiny_base)
        return Run(plan, directory, prepare_data(plan, directory), trainer, scorer, hub, Console(file=io.StringIO()))

    return make
