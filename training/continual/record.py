"""What a run has done so far, as a file that is replaced whole after every stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from training.continual.errors import RunMismatch, RunMissing
from training.continual.metrics import Matrix
from training.continual.plan import ContinualPlan
from training.continual.stage import replace_file

STATE = "state.json"


@dataclass(frozen=True)
class StageRecord:
    """A finished stage."""

    task: str  # label
    version: str  # "team/six@3"
    digest: str
    parent: str | None  # the version it was made from
    row: tuple[float, ...]  # the scores of all tasks afterwards, headline metrics
    metrics: Mapping[str, float]  # all metrics of this stage's own task
    promoted: bool
    refusals: tuple[str, ...] = ()  # why it was not
    text_nats: float | None = None
    seconds: float = 0.0  # of training
    adapter_bytes: int = 0
    kept_bytes: int = 0  # factors that later stages need besides
    memory_bytes: int = 0  # examples kept for replay
    memory_digest: str | None = None
    notes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """A run's state."""

    plan: Mapping[str, Any]
    plan_digest: str
    data: Mapping[str, str]  # what it is made of → digest: "first/train", "text", "base"; early runs have files alone
    base_row: tuple[float, ...] = ()
    base_text_nats: float | None = None
    stages: tuple[StageRecord, ...] = ()
    stopped: bool = False  # by a refusal

    @property
    def labels(self) -> tuple[str, ...]:
        """The tasks, in order."""
        return tuple(task["label"] for task in self.plan["tasks"])

    @property
    def matrix(self) -> Matrix:
        """The scores so far; raises `RunMissing` before the first stage is done."""
        if not self.stages:
            raise RunMissing("no stage of this run is finished yet")
        return Matrix(self.labels, self.base_row, tuple(stage.row for stage in self.stages))

    def check_plan(self, directory: Path, plan: ContinualPlan) -> None:
        """Raise `RunMismatch` unless the run in `directory` is of this plan, or of its first tasks."""
        if self.plan_digest == plan.digest or self.begins(plan):
            return
        known = json.loads(json.dumps(plan.as_dict()))
        differs = sorted(key for key in known.keys() | self.plan.keys() if known.get(key) != self.plan.get(key))
        hint = "; tasks can be appended, those that are there stay" if differs == ["tasks"] else ""
        raise RunMismatch(f"{directory} holds a run of another plan (other: {', '.join(differs)}){hint}")

    def check_data(self, data: Mapping[str, str]) -> None:
        """Raise `RunMismatch` where something of which this run knows the digest has another now."""
        if changed := sorted(name for name in data if self.data.get(name, data[name]) != data[name]):
            raise RunMismatch(f"the data has changed since this run began: {', '.join(changed)}")

    def begins(self, plan: ContinualPlan) -> bool:
        """Whether `plan` is this run's with tasks appended and all else equal."""
        known, count = json.loads(json.dumps(plan.as_dict())), len(self.labels)
        tasks = known["tasks"]
        return len(tasks) > count and {**known, "tasks": tasks[:count]} == self.plan

    def write(self, directory: Path) -> None:
        """Replace the state in `directory`."""
        replace_file(directory / STATE, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def read(cls, directory: Path) -> Self:
        """The state in `directory`; raises `RunMissing`, `RunMismatch` where it is none of ours."""
        try:
            value = json.loads((directory / STATE).read_text("utf-8"))
            stages = tuple(
                StageRecord(**{**stage, "row": tuple(stage["row"]), "refusals": tuple(stage["refusals"])})
                for stage in value.pop("stages")
            )
            return cls(**{**value, "base_row": tuple(value["base_row"]), "stages": stages})
        except FileNotFoundError as error:
            raise RunMissing(f"there is no continual run in {directory}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise RunMismatch(f"{directory / STATE} is not the state of a continual run: {error}") from error
