"""`hub continual`: task after task on one base, and what was forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json
from server.cli import bound_openmp
from training.cli_collect import collect_command
from training.cli_compare import compare_command
from training.cli_router import router_command
from training.quiet import quiet_libraries


@click.group()
def continual() -> None:
    """Learn task after task, measure what was forgotten, and promote only what forgot little enough."""


continual.add_command(collect_command)
continual.add_command(compare_command)
continual.add_command(router_command)


@continual.command(
    epilog=examples(
        """
hub continual run six.yaml --out runs/six
hub continual run six.yaml --out runs/six        # after an interruption: goes on
"""
    )
)
@click.argument("plan", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The run's directory.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads.  [default: all cores]")
@hub_option
@json_option
def run(plan: Path, out: Path, threads: int, hub_url: str | None, as_json: bool) -> None:
    """Run PLAN, a YAML file: a base, tasks in order, a strategy, gates (docs/continual.md has them all).

    After every stage all tasks are scored, the adapter becomes the next version of the plan's name in the hub with the
    stage before as its parent, and the alias (prod) moves to it if no earlier task fell by more than the plan allows.
    A run that was interrupted, in whatever way, goes on when the same command is given again; so does one to whose plan
    tasks were appended. A first stage never takes an alias that is in use.
    """
    bound_openmp(threads)
    quiet_libraries()
    from rich.console import Console

    from hub.opening import open_hub
    from training.continual.errors import RunTaken
    from training.continual.making import make_run
    from training.continual.plan import ContinualPlan
    from training.lock import held

    read = ContinualPlan.read(plan)
    taken = RunTaken(f"another process runs a plan in {out}: wait for it, or stop it")
    with held(out, taken), open_hub(hub_url) as hub:
        record = make_run(read, out, hub, threads, Console(stderr=True))()
    from training.continual import answer_nats
    from training.continual.ending import read_intruders, read_routed
    from training.continual.report import as_markdown, summary

    nats = answer_nats.read(out, len(record.stages))
    told = summary(record, read_intruders(out), {}, read_routed(out), nats)
    print_json(told) if as_json else click.echo(as_markdown(told))


@continual.command(
    epilog=examples(
        """
hub continual report runs/replay
hub continual report runs/replay --single runs/isolated --joint runs/joint --out docs/replay
"""
    )
)
@click.argument("directory", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where to.  [default: DIRECTORY/report]")
@click.option(
    "--single",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A run of the same tasks with the strategy isolated: the bound of each task alone.",
)
@click.option(
    "--joint",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A run of the same tasks with the strategy joint: the bound of all tasks at once.",
)
@json_option
def report(directory: Path, out: Path | None, single: Path | None, joint: Path | None, as_json: bool) -> None:
    """Draw the run in DIRECTORY: report.md, report.json, the matrix, the tasks' curves, intruders by layer.

    A run that is not finished is drawn as far as it is.
    """
    from training.continual.report import as_markdown, write_report

    place = out or directory / "report"
    told: dict[str, Any] = write_report(directory, place, single, joint)
    print_json(told) if as_json else click.echo(as_markdown(told))
    click.echo(f"written to {place}", err=True)
