"""A plan made ready to run: its data, the trainer, the engine that scores, the hub."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from hub.base import base_identity, locate_base
from hub.facade import HubFacade
from training.continual.embedding import EngineEmbed
from training.continual.plan import ContinualPlan
from training.continual.record import STATE, RunRecord
from training.continual.run import Run
from training.continual.scoring import EngineScorer, Exam
from training.continual.stage import StageTrainer
from training.continual.tasks import TaskData, prepare_data, text_of
from training.errors import DataTooSmall
from training.tasks import task_named
from training.text_loss import cut


def make_run(
    plan: ContinualPlan,
    directory: Path,
    hub: HubFacade,
    threads: int,
    console: Console,
    data: tuple[TaskData, ...] | None = None,
) -> Run:
    """The run of `plan` in `directory`; `data` where it is read already.

    Raises what reading and building raise, `RunMismatch` where the directory holds another plan's run, and
    `DataTooSmall` where a text is too short to measure.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / STATE).is_file():  # before anything is built there
        RunRecord.read(directory).check_plan(directory, plan)
    data = data if data is not None else prepare_data(plan, directory)
    located = locate_base(plan.base).directory
    identity, _ = base_identity(plan.base)
    cores = threads or len(os.sched_getaffinity(0))
    scorer = EngineScorer(
        base=plan.base,
        base_directory=located,
        exams=tuple(
            Exam(task.label, task_named(task.task), one.evaluation.examples)
            for task, one in zip(plan.tasks, data, strict=True)
        ),
        quantize=plan.quantize,
        threads=cores,
        text=_text(plan, "text", plan.text, located),
        text_windows=plan.text_windows,
        keep_text=_text(plan, "keep_text", plan.keep_text, located),
        precision=plan.recipe.precision,
        served_rank=plan.served_rank,
    )
    trainer = StageTrainer(identity, located, plan.method, plan.recipe, cores, plan.max_steps, plan.checkpoint_steps)
    embed = EngineEmbed(plan.base, plan.quantize, cores) if plan.strategy == "isolated" else None
    return Run(plan, directory, data, trainer, scorer, hub, console, embed)


def _text(plan: ContinualPlan, key: str, name: str | None, base: Path) -> str | None:
    """The text that the plan's `key` names, if any, cut once as it will be, so that one too short is known at once."""
    text = text_of(plan, key, name)
    if text is not None:
        try:
            cut(base, text)
        except DataTooSmall as error:
            raise DataTooSmall(f"{key}: {name}: {error}") from error
    return text
