"""How a run begins or goes on: whose its directory is, what was appended, and what fails sooner or later fails now.

What is known to fail after hours of training is looked for when tasks come into the run, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hub.errors import HubNotFound, NotFound
from server.config import EngineLimits
from training.continual.contract import Strategy
from training.continual.errors import AliasTaken, RunMissing
from training.continual.record import RunRecord
from training.continual.router import LEAST_PROMPTS
from training.continual.scoring import Cell, headline
from training.continual.tasks import digests, text_digests
from training.errors import DataInvalid, DataTooSmall
from training.tasks import task_named

if TYPE_CHECKING:
    from training.continual.run import Run


def begin(run: Run, strategy: Strategy) -> RunRecord:
    """The record of the run in its directory, written there: begun, gone on with, or with tasks appended.

    Raises `RunMismatch` where the directory holds another plan's run or the data has changed since, `AliasTaken` where
    a first stage would take somebody else's alias, and `DataInvalid`, `DataTooSmall`, `GenerationFailed` for what could
    not be scored.
    """
    now = {**digests(run.data), **text_digests(run.plan)}
    if run.trainer.base.fingerprint is not None:
        now["base"] = run.trainer.base.fingerprint
    try:
        record = RunRecord.read(run.directory)
    except RunMissing:
        _check_new(run, strategy, 0)
        record = RunRecord(run.plan.as_dict(), run.plan.digest, now)
        record.write(run.directory)
    record.check_plan(run.directory, run.plan)
    record.check_data(now)
    whole = replace(record, data={**record.data, **now})  # early runs did not record all of it
    if record.begins(run.plan):
        _check_new(run, strategy, len(record.labels))
        whole = _appended(run, strategy, whole)
    if whole != record:
        whole.write(run.directory)
    if len(whole.stages) < len(run.plan.tasks):
        _tell_rank(run, strategy)
    return whole


def _appended(run: Run, strategy: Strategy, record: RunRecord) -> RunRecord:
    """The record of the longer plan: what the base, and each finished stage, make of the tasks that are new."""
    new = range(len(record.labels), len(run.plan.tasks))
    record = replace(record, plan=run.plan.as_dict(), plan_digest=run.plan.digest)
    if not record.stages:
        return record
    cells: list[Cell] = [(exam, None) for exam in new]
    if strategy.evolving:
        cells += [
            (exam, run.stage_directory(index) / "outcome" / "served")
            for index in range(len(record.stages))
            for exam in new
        ]
    run.console.print(
        f"{len(new)} appended tasks, asked of the base and of finished stages: "
        f"{', '.join(run.plan.labels[exam] for exam in new)}",
        highlight=False,
    )
    found = [headline(one) for one in run.scorer.scores(cells)]
    base, rest = found[: len(new)], found[len(new) :]
    stages = tuple(
        replace(
            stage,
            row=(*stage.row, *(rest[index * len(new) : (index + 1) * len(new)] if strategy.evolving else base)),
        )
        for index, stage in enumerate(record.stages)
    )
    return replace(record, base_row=(*record.base_row, *base), stages=stages)


def _check_new(run: Run, strategy: Strategy, first: int) -> None:
    """See the module; `first` is the first task that is new to the run."""
    _check_aliases(run, strategy, first)
    for task, data in zip(run.plan.tasks[first:], run.data[first:], strict=True):
        try:
            task_named(task.task).check(data.evaluation.examples)
        except DataInvalid as error:
            raise DataInvalid(f"{task.label}, evaluation: {error}") from error
    run.scorer.check(first)
    if run.embed is not None and not strategy.evolving and len(run.data) > 1:
        few = [data.label for data in run.data[first:] if len(data.train) < LEAST_PROMPTS]
        if few:
            raise DataTooSmall(
                f"{', '.join(few)}: fewer than {LEAST_PROMPTS} training examples, from which no router learns a task; "
                f"{strategy.name} needs so many of each"
            )


def _check_aliases(run: Run, strategy: Strategy, first: int) -> None:
    """A first stage has no score that it could be held to, so it must not take the place of an adapter in use."""
    if strategy.evolving and first:
        return  # the name is this run's already
    names: Sequence[str] = [run.plan.adapter_name(label) for label in run.plan.labels[first:]]
    for name in dict.fromkeys(names):
        try:
            held = run.hub.aliases(name).get(run.plan.gates.alias)
        except (NotFound, HubNotFound):
            continue
        if held is not None:
            alias = run.plan.gates.alias
            raise AliasTaken(
                f"{name}:{alias} is {name}@{held.version} already, which this run has not made; its first stage would "
                f"take that place whatever it forgets. Go on with the run that made it (its --out, with the new tasks "
                f"appended to its plan), or give the plan another name or gates: {{alias: …}} than {alias}"
            )


def _tell_rank(run: Run, strategy: Strategy) -> None:
    most, rank = EngineLimits().max_adapter_rank, run.plan.recipe.rank
    stages = range(1, len(run.plan.tasks) + 1)
    beyond = next((stage for stage in stages if strategy.served_rank(rank, stage) > most), None)
    if beyond is not None:
        run.console.print(
            f"from stage {beyond} on the adapter's rank passes {most}, the most that `hub serve` takes: it can be "
            "scored here and not be served",
            highlight=False,
            soft_wrap=True,
        )
