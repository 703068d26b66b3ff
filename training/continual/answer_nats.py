"""How well a run's adapters know their tasks' own answers: finer than scores, which change by whole questions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from training.continual.scoring import Scorer
from training.continual.stage import replace_file
from training.continual.tasks import TaskData

ANSWER_NATS = "answer_nats.json"


def measure(scorer: Scorer, data: Sequence[TaskData], own: Sequence[Path], last: Path | None) -> dict[str, list[float]]:
    """{"own", "last"}, a number a task: the mean over its questions of the reference answer's nats a token.

    Questions that are too long to read are left out, NaN where all are; "too_long" counts them.
    "own" is with the adapter of the task's own stage (`own`, directories), "last" with `last`, or the same again where
    it is None: then every task keeps its own adapter.
    """
    told: dict[str, list[float]] = {"own": [], "last": [], "too_long": []}
    for task, adapter in zip(data, own, strict=True):
        asked = [adapter] if last is None or last == adapter else [adapter, last]
        losses = [
            [one for one in each if not math.isnan(one)] for each in scorer.losses(asked, task.evaluation.examples)
        ]
        found = [sum(each) / len(each) if each else math.nan for each in losses]
        told["own"].append(found[0])
        told["last"].append(found[-1])
        told["too_long"].append(len(task.evaluation) - len(losses[0]))
    return told


def write(directory: Path, told: dict[str, list[float]], stages: int) -> None:
    """Keep it beside the run's state; `stages` is how many there were."""
    replace_file(directory / ANSWER_NATS, json.dumps({"stages": stages, **told}).encode())


def read(directory: Path, stages: int) -> dict[str, list[float]] | None:
    """What was measured after so many stages of the run in `directory`, or None."""
    place = directory / ANSWER_NATS
    if not place.is_file():
        return None
    told = json.loads(place.read_text("utf-8"))
    return {name: told[name] for name in ("own", "last")} if told["stages"] == stages else None
