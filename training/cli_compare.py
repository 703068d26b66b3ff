"""`hub continual compare`: every strategy over orders and seeds, kept run by run, and the page that tells of it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.cli_options import examples, json_option
from hub.cli_output import print_json, print_table
from server.cli import bound_openmp
from training.quiet import quiet_libraries
from training.sitting import duration, machine

if TYPE_CHECKING:
    from training.continual.compare.plan import Case


@click.command(
    "compare",
    epilog=examples(
        """
hub continual compare training/experiments/continual.yaml --out results/continual --dry-run
hub continual compare training/experiments/continual.yaml --out results/continual --size tiny --threads 1
hub continual compare training/experiments/continual.yaml --out results/continual --only joint --only 'replay-*'
"""
    ),
)
@click.argument("comparison", type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="COMPARISON.yaml")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True,
    help="Finished runs and pictures; taken up again. The page is OUT.md.",
)  # fmt: skip
@click.option("--size", default="small", show_default=True, help="Which of the comparison's sizes.")
@click.option("--only", "arms", multiple=True, metavar="GLOB", help="Only arms like this; repeatable.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads.  [default: all cores]")
@click.option("--work", type=click.Path(path_type=Path, file_okay=False), help="Unfinished runs.  [default: OUT/work]")
@click.option("--dry-run", is_flag=True, help="Print the runs and how long they may take; run nothing.")
@click.option("--report-only", is_flag=True, help="Write the page from what is finished; run nothing.")
@click.option("--note", default="", metavar="TEXT", help="A sentence for the page, such as what else the machine did.")
@click.option("--keep", is_flag=True, help="Keep finished runs in the work directory too, with adapters and routers.")
@json_option
def compare_command(
    comparison: Path, out: Path, size: str, arms: tuple[str, ...], threads: int, work: Path | None, dry_run: bool,
    report_only: bool, note: str, keep: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run every arm of COMPARISON.yaml in every order with every seed, and write the page OUT.md.

    The file names a continual plan, the arms (a strategy each, with intruder reduction or without), orders of the tasks
    and sizes (docs/continual.md). A finished run is a small JSON file in OUT/cells, known by everything that decides
    its outcome, and is not run again; one that was killed goes on with the same command. The page is written after
    every run.
    """
    bound_openmp(threads)
    quiet_libraries()
    from rich.console import Console

    from hub.base import base_identity
    from training.cells import Cells
    from training.continual.compare.page import write_page
    from training.continual.compare.plan import Comparison
    from training.continual.compare.run import Kept, alone, run_cases

    read = Comparison.read(comparison, size)
    cases = [case for case in read.cases if not arms or any(fnmatchcase(case.arm, arm) for arm in arms)]
    if not cases:
        raise click.UsageError(f"the comparison has no arm like this; it has: {', '.join(read.arms)}")
    identity, _ = base_identity(read.base)
    kept = Kept(Cells(out / "cells"), work or out / "work", identity.fingerprint or "")

    def records() -> dict[Case, Any]:
        return {case: record for case in read.cases if (record := kept.record(case)) is not None}

    if dry_run:
        _dry_run(cases, records(), as_json)
        return
    command = shlex.join(["hub", "continual", "compare", str(comparison), "--out", str(out), "--size", size])

    def page() -> Path:
        made = records()
        threads_of, processors = ({one[field] for one in made.values()} for field in ("threads", "processor"))
        told = " ".join(filter(None, (machine(threads_of, "a run", processors), note)))
        return write_page(read, made, kept.data(read.cases[0]), out, told, command)

    if not report_only:
        with alone(kept.work):
            run_cases(cases, kept, threads, Console(stderr=True), _Progress(page, cases, records()), keep)
    written = page()
    if as_json:
        print_json({"report": str(written), "runs": len(cases), "finished": len(records())})
    else:
        click.secho(f"written: {written}", bold=True, err=True)


def _dry_run(cases: list[Case], records: Mapping[Case, Any], as_json: bool) -> None:
    known = Expected(cases, records)
    left = known.left()
    rows = [(case, case in records, known.of(case)) for case in cases]
    if as_json:
        print_json(
            {
                "seconds_left": left,
                "runs": [
                    {"arm": case.arm, "order": case.order, "seed": case.seed, "finished": done, "seconds": seconds}
                    for case, done, seconds in rows
                ],
            }
        )
        return
    print_table(
        ["arm", "order", "seed", "", "takes"],
        [
            [
                case.arm, case.order, str(case.seed), "finished" if done else "",
                "" if done else "unknown" if seconds is None else f"about {duration(seconds)}",
            ]
            for case, done, seconds in rows
        ],
    )  # fmt: skip
    told = "nothing is known of the time before the first" if left is None else f"the others: about {duration(left)}"
    click.echo(f"{len(cases)} runs, {sum(done for _, done, _ in rows)} finished; {told}")


class Expected:
    """How long runs take, by those that are finished: of the same arm where there are any."""

    def __init__(self, cases: list[Case], records: Mapping[Case, Any]) -> None:
        self._cases = cases
        self._finished = set(records)
        self._took: dict[str, list[float]] = {}
        for case, record in records.items():
            self._note(case, record)

    def finished(self, case: Case, record: Mapping[str, Any]) -> None:
        """One more is."""
        self._finished.add(case)
        self._note(case, record)

    def of(self, case: Case) -> float | None:
        """Seconds of one run; None before any is finished."""
        took = self._took.get(case.arm) or [one for each in self._took.values() for one in each]
        return sum(took) / len(took) if took else None

    def left(self) -> float | None:
        """Seconds of all that are not finished."""
        each = [self.of(case) for case in self._cases if case not in self._finished]
        return sum(one for one in each if one is not None) if None not in each else None

    def _note(self, case: Case, record: Mapping[str, Any]) -> None:
        if not record["resumed"]:  # else the time is that of its last part
            self._took.setdefault(case.arm, []).append(float(record["seconds"]))


class _Progress:
    """A line for each run, with what is left; the page after each."""

    def __init__(self, page: Callable[[], Path], cases: list[Case], records: Mapping[Case, Any]) -> None:
        self._page = page
        self._expected = Expected(cases, records)
        self._cases = self._done = 0

    def begin(self, cases: int, finished: int) -> None:
        """See `training.continual.compare.run.Watcher`."""
        self._cases, self._done = cases, finished
        click.echo(f"{cases} runs, {finished} of them finished before", err=True)

    def working(self, case: Case) -> None:
        """See `training.continual.compare.run.Watcher`."""
        self._say(case.text)

    def finished(self, case: Case, record: Mapping[str, Any]) -> None:
        """See `training.continual.compare.run.Watcher`."""
        self._done += 1
        self._expected.finished(case, record)
        left = self._expected.left()
        told = "" if left is None else f", about {duration(left)} left"
        self._say(f"{case.text}: ACC {record['summary']['acc']:.3f} in {duration(record['seconds'])}{told}")
        self._page()

    def _say(self, text: str) -> None:
        click.echo(f"{time.strftime('%H:%M:%S')} [{self._done}/{self._cases}] {text}", err=True)
