"""Runs what of a comparison is not finished, one run after another; each finished one is a small JSON file.

OUT/cells/<key>.json        what a run came to: matrix, metrics, sizes, times, precision, machine, libraries, data
WORK/data/…, shared/…       the tasks' files; what several runs have in common, see `shared`
WORK/runs/<key>/            a run that is not finished, with a hub of its own; removed once it is kept

Killed at any point, the same command goes on: a run by itself goes on where it was, see `training.continual.run`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from hub.facts import FACTS_FILE, Facts
from hub.hub import Hub
from server.config import ModelConfig
from training.cells import Cells, key_of
from training.continual import answer_nats
from training.continual.compare.bound import joint_bound
from training.continual.compare.plan import Case
from training.continual.compare.shared import sharing
from training.continual.ending import read_intruders, read_routed
from training.continual.errors import WorkTaken
from training.continual.factors import read_factors
from training.continual.making import make_run
from training.continual.report import summary
from training.continual.run import Run
from training.continual.tasks import TaskData, digests, prepare_data, text_digests
from training.lock import held
from training.sitting import processor

Make = Callable[[Case, Path, tuple[TaskData, ...]], Any]  # a context manager that gives a Run


class Watcher(Protocol):
    """What is told while a comparison runs."""

    def begin(self, cases: int, finished: int) -> None:
        """So many runs, of which so many are finished already."""

    def working(self, case: Case) -> None:
        """This run begins or goes on."""

    def finished(self, case: Case, record: Mapping[str, Any]) -> None:
        """It is finished."""


@dataclass(frozen=True)
class Kept:
    """A comparison's files, and what makes its cells what they are."""

    cells: Cells
    work: Path
    base: str  # the base's fingerprint
    _read: dict[tuple[Path, tuple[str, ...]], tuple[TaskData, ...]] = field(default_factory=dict, repr=False)

    def data(self, case: Case) -> tuple[TaskData, ...]:
        """The run's tasks, read once, built where they are not there yet; runs of one seed share the files."""
        plan = case.plan
        sizes = sorted((task.label, task.task, task.train, task.evaluation) for task in plan.tasks)
        place = self.work / "data" / f"{case.seed}-{key_of(sizes)}"
        if (place, plan.labels) not in self._read:
            _made(self.work)
            self._read[place, plan.labels] = prepare_data(plan, place)
        return self._read[place, plan.labels]

    def key(self, case: Case, data: Sequence[TaskData]) -> str:
        """The name of the run's cell."""
        return case.key(self.base, digests(data), *_text_digests(case))

    def record(self, case: Case) -> dict[str, Any] | None:
        """What the run came to, or None."""
        return self.cells.finished(self.key(case, self.data(case)))


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold the work directory, which is made where it is not there; raises `WorkTaken` where another process does."""
    _made(work)
    taken = WorkTaken(f"another comparison is at work in {work}; give one of them another --work")
    with held(work, taken):
        yield


def run_cases(
    cases: Sequence[Case], kept: Kept, threads: int, console: Console, watcher: Watcher, keep: bool = False,
    make: Make | None = None,
) -> None:  # fmt: skip
    """Finish every run, in this order. Raises what a run raises; what was finished before stays."""
    make = make or _maker(kept, threads, console)
    watcher.begin(len(cases), sum(kept.record(case) is not None for case in cases))
    for case in cases:
        data = kept.data(case)
        key = kept.key(case, data)
        if kept.cells.finished(key) is not None:
            continue
        watcher.working(case)
        directory = kept.work / "runs" / key
        record = {
            "base": kept.base,
            "data": digests(data),
            "text": _text_digests(case)[0],
            "threads": threads,
            **_run(case, directory, data, make),
        }
        kept.cells.finish(key, record)
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
        watcher.finished(case, record)


def _run(case: Case, directory: Path, data: tuple[TaskData, ...], make: Make) -> dict[str, Any]:
    resumed = directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    began, cpu = time.monotonic(), time.process_time()
    with make(case, directory, data) as run:
        if case.plan.strategy == "joint":
            told, facts = joint_bound(run)
            trained, last = [facts], directory / "joint" / "served"
        else:
            record = run()
            nats = answer_nats.read(directory, len(record.stages))
            told = summary(record, read_intruders(directory), {}, read_routed(directory), nats)
            stages = [run.stage_directory(index) for index in range(len(record.stages))]
            trained = [Facts.parse((stage / "outcome" / FACTS_FILE).read_bytes()) for stage in stages]
            last = stages[-1] / "adapter"
    return {
        "summary": told,
        "served_rank": max(pair.rank for pair in read_factors(last).values()),
        "training_cpu_seconds": sum(float(one.metrics.get("cpu_seconds", 0.0)) for one in trained),
        "seconds": round(time.monotonic() - began, 1),  # of what this process did of it
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "resumed": resumed,
        "precision": {
            "training": str(trained[-1].metrics.get("precision", "unknown")),
            "answers": ModelConfig(quantization=case.plan.quantize).dtype,
        },
        "libraries": dict(trained[-1].recipe.get("libraries", {})),
        "processor": processor(),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _maker(kept: Kept, threads: int, console: Console) -> Make:
    @contextmanager
    def made(case: Case, directory: Path, data: tuple[TaskData, ...]) -> Iterator[Run]:
        with Hub.open(str(directory / "hub")) as hub:
            run = make_run(case.plan, directory, hub, threads, console, data)
            trainer, scorer = sharing(run.trainer, run.scorer, kept.work / "shared")
            yield replace(run, trainer=trainer, scorer=scorer)

    return made


def _made(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n", "utf-8")


def _text_digests(case: Case) -> tuple[str | None, str | None]:
    """Of the held-out text and of the text to keep."""
    found = text_digests(case.plan)
    return found.get("text"), found.get("keep_text")
