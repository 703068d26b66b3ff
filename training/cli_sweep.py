"""`hub sweep`: a grid of recipes, tasks and seeds, run, scored and written up."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.cli_options import examples, json_option
from hub.cli_output import print_json, print_table
from server.cli import bound_openmp
from training.quiet import quiet_libraries
from training.sitting import duration, machine

if TYPE_CHECKING:
    from training.sweep.plan import Cell, SweepPlan
    from training.sweep.records import TaskData


@click.command(
    epilog=examples(
        """
hub sweep training/experiments/1-methods.yaml --out results/methods --dry-run
hub sweep training/experiments/1-methods.yaml --out results/methods --size small --threads 1
hub sweep training/experiments/1-methods.yaml --out results/methods --report-only
"""
    )
)
@click.argument("plan", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="PLAN.yaml")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Results; taken up again.")
@click.option("--size", default="small", show_default=True, help="Which of the plan's sizes.")
@click.option("--task", "tasks", multiple=True, help="Only this task of the plan; repeatable.")
@click.option("--variant", "variants", multiple=True, metavar="GLOB", help="Only variants like this; repeatable.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads of a cell.  [default: all cores]")
@click.option("--dry-run", is_flag=True, help="Print the cells and what the planner expects of them; train nothing.")
@click.option("--report-only", is_flag=True, help="Write the page from what is finished; train nothing.")
@click.option("--note", default="", metavar="TEXT", help="A sentence for the page, such as what else the machine did.")
@click.option("--keep", is_flag=True, help="Keep every cell's weights in OUT/work; they are removed once scored.")
@click.option("--rescore", is_flag=True, help="Score finished cells again whose weights were kept.")
@json_option
def sweep(
    plan: Path, out: Path, size: str, tasks: tuple[str, ...], variants: tuple[str, ...], threads: int, dry_run: bool,
    report_only: bool, note: str, keep: bool, rescore: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train and score every cell of PLAN.yaml (a task, a variant, a seed), and write OUT/PLAN.md with plots.

    Each cell trains in a process of its own, of which memory and time are measured. The adapters of one task and seed
    are scored together, in one mixed batch of the engine; a full fine-tune is served alone. A cell is known by its
    resolved recipe, base and data: what is finished is not run again, so a sweep goes on where it was stopped, and a
    changed plan runs only what changed. Plans that share OUT share their cells, and several processes can work at them
    side by side: a cell that one is at is left out by the others. The page is written after every cell.
    """
    bound_openmp(threads)
    quiet_libraries()
    from hub.base import base_identity
    from training.sweep.plan import SweepPlan
    from training.sweep.records import Records
    from training.sweep.report import write_page
    from training.sweep.run import Setting, prepare_data, run

    whole = SweepPlan.read(plan, size)
    read = _only(whole, tasks, variants)
    records = Records(out)
    data = prepare_data(whole, records)
    identity, _ = base_identity(read.base)
    fingerprint = identity.fingerprint or ""
    finished = {cell: records.finished(records.key(cell, fingerprint, data[cell.task])) for cell in read.cells}
    if dry_run:
        _dry_run(read, data, finished, threads, as_json)
        return
    command = shlex.join(["hub", "sweep", str(plan), "--size", size])

    def page() -> Path:
        every = (records.finished(records.key(cell, fingerprint, data[cell.task])) for cell in whole.cells)
        made = [one for one in every if one]
        processors = {one["processor"] for one in made if "processor" in one}  # of older cells not known
        where = machine({one["threads"] for one in made}, processors=processors)
        told = " ".join(filter(None, (where, note)))
        return write_page(whole, data, fingerprint, records, told, command)

    if not report_only:
        run(read, data, Setting(read.base, fingerprint, threads, keep, rescore), records, _Line(page))
    written = page()
    if as_json:
        print_json({"report": str(written), "cells": len(read.cells)})
    else:
        click.secho(f"written: {written}", bold=True, err=True)


def _only(plan: SweepPlan, tasks: tuple[str, ...], variants: tuple[str, ...]) -> SweepPlan:
    if unknown := set(tasks) - plan.data.keys():
        raise click.UsageError(f"the plan has no task {min(unknown)}; it has: {', '.join(plan.data)}")
    cells = tuple(
        cell
        for cell in plan.cells
        if (not tasks or cell.task in tasks)
        and (not variants or any(fnmatchcase(cell.variant, variant) for variant in variants))
    )
    if not cells:
        raise click.UsageError("the plan has no variant like this")
    return replace(plan, data={task: plan.data[task] for task in {cell.task: None for cell in cells}}, cells=cells)


def _dry_run(
    plan: SweepPlan,
    data: Mapping[str, TaskData],
    finished: Mapping[Cell, Mapping[str, Any] | None],
    threads: int,
    as_json: bool,
) -> None:
    import torch

    from hub.base import locate_base
    from training import machines
    from training.sweep.estimate import Estimator

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    directory = locate_base(plan.base).directory
    estimator = Estimator(directory, partial(machines.this_machine, directory, None))
    estimates = {cell: estimator.of(cell, data) for cell in plan.cells}
    left = sum(estimate.seconds for cell, estimate in estimates.items() if finished[cell] is None)
    if as_json:
        print_json(
            {
                "seconds_left": round(left),
                "cells": [
                    {
                        "task": cell.task,
                        "variant": cell.variant,
                        "recipe": cell.recipe.as_dict(),
                        "seconds": round(estimate.seconds, 1),
                        "memory_bytes": estimate.memory,
                        "finished": finished[cell] is not None,
                    }
                    for cell, estimate in estimates.items()
                ],
            }
        )
        return
    print_table(
        ["task", "variant", "seed", "method", "rate", "training", "memory", ""],
        [
            [
                cell.task,
                cell.variant,
                str(cell.recipe.seed),
                cell.recipe.method,
                f"{cell.recipe.learning_rate:g}",
                duration(estimate.seconds),
                f"{estimate.memory / 1e9:.1f} GB",
                "finished" if finished[cell] is not None else "",
            ]
            for cell, estimate in estimates.items()
        ],
    )
    click.echo(
        f"{len(plan.cells)} cells, {sum(each is not None for each in finished.values())} finished; training the others "
        f"takes about {duration(left)} by the planner, on a quiet machine, scoring not counted"
    )


class _Line:
    """One line that says how far the sweep is; on a terminal in place, elsewhere a line for each cell."""

    def __init__(self, page: Any) -> None:
        self._page = page
        self._cells = self._done = self._ran = 0
        self._started = time.monotonic()
        self._what = ""
        self._terminal = sys.stderr.isatty()

    def begin(self, cells: int, finished: int) -> None:
        """See `training.sweep.run.Watcher`."""
        self._cells, self._done = cells, finished
        click.echo(f"{cells} cells, {finished} of them finished before", err=True)

    def working(self, what: str) -> None:
        """See `training.sweep.run.Watcher`."""
        self._what = what
        if not self._terminal:
            click.echo(f"{time.strftime('%H:%M:%S')} [{self._done}/{self._cells}] {what}{self._left()}", err=True)
        else:
            self.said("")

    def said(self, line: str) -> None:
        """See `training.sweep.run.Watcher`."""
        if self._terminal:
            _, _, told = line.partition(": ")
            text = f"[{self._done}/{self._cells}] {self._what}  {told}{self._left()}"
            click.echo(f"\r\x1b[K{text[: os.get_terminal_size(2).columns - 1]}", err=True, nl=False)

    def left_out(self, cell: Cell) -> None:
        """See `training.sweep.run.Watcher`."""
        end = "\r\x1b[K" if self._terminal else ""
        click.echo(f"{end}{cell.text}: another process is at it, so it is left out here", err=True)

    def finished(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """See `training.sweep.run.Watcher`."""
        from training.tasks import task_named

        self._done, self._ran = self._done + 1, self._ran + 1
        headline = task_named(cell.task).headline
        told = f"{headline.replace('_', ' ')} {record['scores'][headline]['value']:.3f}"
        end = "\r\x1b[K" if self._terminal else ""
        click.echo(
            f"{end}{time.strftime('%H:%M:%S')} [{self._done}/{self._cells}] {cell.text}: {told}, "
            f"{record['metrics']['cpu_seconds']:.0f} s of CPU, peak {record['peak_bytes'] / 1e9:.1f} GB",
            err=True,
        )
        self._page()

    def _left(self) -> str:
        if not self._ran:
            return ""
        each = (time.monotonic() - self._started) / self._ran
        return f", about {duration(each * (self._cells - self._done))} left"
