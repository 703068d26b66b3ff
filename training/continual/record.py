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
    data: Mapping[str, str]  # file → digest
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

    def check(self, directory: Path, plan: ContinualPlan, data: Mapping[str, str]) -> None:
        """Raise `RunMismatch` unless the run in `directory` is of this plan and of files with these digests."""
        if self.plan_digest != plan.digest:
            known = plan.as_dict()
            differs = sorted(key for key in known if json.loads(json.dumps(known[key])) != self.plan.get(key))
            raise RunMismatch(f"{directory} holds a run of another plan (other: {', '.join(differs)})")
        if changed := sorted(name for name in data if self.data.get(name) != data[name]):
            raise RunMismatch(f"the data has changed since this run began: {', '.join(changed)}")

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
