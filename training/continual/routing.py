"""A run's router: fitted on its tasks' prompts, and what it makes of prompts it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from server.errors import RouterInvalid
from server.router import Router
from training.continual.embedding import Embed
from training.continual.record import RunRecord
from training.continual.router import LEAST_PROMPTS, fit
from training.continual.tasks import TaskData

Names = tuple[str | None, ...]  # by task: the reference of what answers it; None: the base, nothing was promoted


@dataclass(frozen=True)
class Routed:
    """A router and its choices."""

    router: Router
    names: Names
    chosen: tuple[Names, ...]  # by task: for each of its evaluation prompts

    @property
    def right(self) -> tuple[float, ...]:
        """By task: the share of its evaluation prompts that go where they belong."""
        return tuple(
            sum(one == name for one in ones) / len(ones) for name, ones in zip(self.names, self.chosen, strict=True)
        )

    @property
    def to_base(self) -> tuple[float, ...]:
        """By task: the share that goes to the base."""
        return tuple(sum(one is None for one in ones) / len(ones) for ones in self.chosen)


def route(data: Sequence[TaskData], names: Names, embed: Embed) -> Routed:
    """Fit a router on the training prompts of the tasks that have a name, and try it on the evaluation prompts of all.

    `names` are of the first tasks of `data`, those whose stages are done. Raises `RouterInvalid` where fewer than two
    have one or a task has too few prompts, and what `embed` raises.
    """
    if sum(name is not None for name in names) < 2:
        raise RouterInvalid("a router chooses between at least two tasks whose adapters were promoted")
    done = data[: len(names)]
    if few := [name for name, task in zip(names, done, strict=True) if name and len(task.train) < LEAST_PROMPTS]:
        raise RouterInvalid(f"{few[0]} has fewer than {LEAST_PROMPTS} prompts")  # before all are read
    read = embed([*(task.train.examples for task in done), *(task.evaluation.examples for task in done)])
    seen, held = read.groups[: len(done)], read.groups[len(done) :]
    rows = {name: group for name, group in zip(names, seen, strict=True) if name is not None}
    router = fit(rows, read.layer, read.base, read.quantization)
    return Routed(router, names, tuple(tuple(router.choose(row).adapter for row in group) for group in held))


def alias_names(record: RunRecord) -> Names:
    """The alias that the plan promotes, of each finished stage's adapter: a server follows it wherever it moves."""
    alias = record.plan["gates"]["alias"]
    return tuple(f"{stage.version.rpartition('@')[0]}:{alias}" if stage.promoted else None for stage in record.stages)


def version_names(record: RunRecord) -> Names:
    """The versions themselves, of each finished stage that was promoted."""
    return tuple(stage.version if stage.promoted else None for stage in record.stages)
