"""A plan made ready to run: its data, the trainer, the engine that scores, the hub."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

from hub.base import base_identity, locate_base
from hub.facade import HubFacade
from training.continual.embedding import EngineEmbed
from training.continual.plan import ContinualPlan
from training.continual.run import Run
from training.continual.scoring import EngineScorer, Exam
from training.continual.stage import StageTrainer
from training.continual.tasks import TaskData, prepare_data
from training.tasks import task_named
from training.text_loss import read_text


def make_run(
    plan: ContinualPlan,
    directory: Path,
    hub: HubFacade,
    threads: int,
    console: Console,
    data: tuple[TaskData, ...] | None = None,
) -> Run:
    """The run of `plan` in `directory`; `data` where it is read already. Raises what reading and building raise."""
    directory.mkdir(parents=True, exist_ok=True)
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
        text=read_text(plan.directory / plan.text) if plan.text is not None else None,
        text_windows=plan.text_windows,
        keep_text=read_text(plan.directory / plan.keep_text) if plan.keep_text is not None else None,
        precision=plan.recipe.precision,
    )
    trainer = StageTrainer(identity, located, plan.method, plan.recipe, cores, plan.max_steps, plan.checkpoint_steps)
    embed = EngineEmbed(plan.base, plan.quantize, cores) if plan.strategy == "isolated" else None
    return Run(plan, directory, data, trainer, scorer, hub, console, embed)
