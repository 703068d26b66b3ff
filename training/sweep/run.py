"""Runs a sweep: trains what is not trained, scores what is not scored, one process at a time.

Cells are taken a comparison at a time (one task, one seed): all its variants are trained, then scored together. What is
finished stays finished, so a sweep can be stopped at any moment and started again with the same command.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from training.build import CARD, build_task
from training.errors import CellFailed, CellTaken
from training.sitting import processor
from training.sweep.plan import Cell, SweepPlan
from training.sweep.records import Records, TaskData

RESAMPLES: Final = 400
_KEPT_LINES = 20  # of what a process says, for the message when it fails
DATA_SEED: Final = 0  # every cell sees the same examples; the training's seed moves everything else


class Watcher(Protocol):
    """What is told while a sweep runs."""

    def begin(self, cells: int, finished: int) -> None:
        """So many cells, of which so many are finished already."""

    def working(self, what: str) -> None:
        """This is what is being done now."""

    def said(self, line: str) -> None:
        """The process at work said this."""

    def left_out(self, cell: Cell) -> None:
        """Another process is at this cell, so this one is not."""

    def finished(self, cell: Cell, record: Mapping[str, Any]) -> None:
        """A cell is finished."""


@dataclass(frozen=True)
class Setting:
    """Where a sweep runs."""

    base: str  # as `hub.base.locate_base` takes it
    fingerprint: str
    threads: int
    keep: bool = False  # keep the weights after they are scored
    rescore: bool = False  # score finished cells again whose weights were kept


def prepare_data(plan: SweepPlan, records: Records) -> dict[str, TaskData]:
    """Build each task's files where they are not there yet; raises what `training.build` raises."""
    records.work.mkdir(parents=True, exist_ok=True)
    (records.work / ".gitignore").write_text("*\n", "utf-8")
    found = {}
    for task, size in plan.data.items():
        directory = records.work / "data" / f"{task}-{size.train}-{size.evaluation}"
        if not (directory / CARD).is_file():
            build_task(task, directory, size.train, size.evaluation, DATA_SEED)
        files = json.loads((directory / CARD).read_text("utf-8"))["files"]
        found[task] = TaskData(
            directory / "train.jsonl",
            directory / "eval.jsonl",
            files["train.jsonl"]["digest"],
            files["eval.jsonl"]["digest"],
        )
    return found


def run(plan: SweepPlan, data: Mapping[str, TaskData], setting: Setting, records: Records, watcher: Watcher) -> None:
    """Finish every cell of `plan` that no other process is at. Raises `CellFailed`; what was finished before stays."""
    keys = {cell: records.key(cell, setting.fingerprint, data[cell.task]) for cell in plan.cells}
    watcher.begin(len(keys), sum(records.finished(key) is not None for key in keys.values()))
    for group in _groups(plan.cells):
        with ExitStack() as locks:
            pending = _taken_up({cell: keys[cell] for cell in group}, setting, records, watcher, locks)
            for cell, key in pending.items():
                if records.trained(key) is None:
                    watcher.working(f"training {cell.text}")
                    _train(cell, key, data[cell.task], setting, records, watcher.said)
            for cells in _scored_together(pending):
                watcher.working(f"scoring {len(cells)} of {cells[0].task} together")
                _score(cells, pending, data[cells[0].task], setting, records, watcher)


def _taken_up(
    group: Mapping[Cell, str], setting: Setting, records: Records, watcher: Watcher, locks: ExitStack
) -> dict[Cell, str]:
    """The cells to finish that no other process is at, with their keys; this one holds them until `locks` closes."""
    found = {}
    for cell, key in group.items():
        if not _is_pending(key, setting, records):
            continue
        try:
            locks.enter_context(records.alone(key))
        except CellTaken:
            watcher.left_out(cell)
            continue
        if _is_pending(key, setting, records):  # and not finished by another process just before
            found[cell] = key
    return found


def _is_pending(key: str, setting: Setting, records: Records) -> bool:
    return records.finished(key) is None or (setting.rescore and records.trained(key) is not None)


def _groups(cells: tuple[Cell, ...]) -> Iterator[list[Cell]]:
    """The cells of one seed and one task, in the plan's order."""
    groups: dict[tuple[int, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.recipe.seed, cell.task), []).append(cell)
    yield from groups.values()


def quantization_of(cell: Cell) -> str:
    """How the base is held while a cell is scored: as it was while the cell was trained."""
    return "nf4" if cell.recipe.method == "qlora" else "none"


def _scored_together(pending: Mapping[Cell, str]) -> Iterator[list[Cell]]:
    """Adapters on one base share batches; a full fine-tune is a base of its own."""
    for quantization in ("none", "nf4"):
        cells = [cell for cell in pending if cell.recipe.method != "full" and quantization_of(cell) == quantization]
        if cells:
            yield cells
    for cell in pending:
        if cell.recipe.method == "full":
            yield [cell]


def _train(
    cell: Cell, key: str, data: TaskData, setting: Setting, records: Records, said: Callable[[str], object]
) -> None:
    out = records.weights(key)
    shutil.rmtree(out, ignore_errors=True)  # written by a run that died before its measurements were
    spec = {
        "kind": "train",
        "recipe": cell.recipe.as_dict(),
        "base": setting.base,
        "train": str(data.train),
        "out": str(out),
        "threads": setting.threads,
        "result": str(records.work / f"{key}.json"),
    }
    _in_process(spec, records.work / f"{key}.spec.json", cell.text, said)


def _score(
    cells: list[Cell],
    keys: Mapping[Cell, str],
    data: TaskData,
    setting: Setting,
    records: Records,
    watcher: Watcher,
) -> None:
    full = cells[0].recipe.method == "full"
    quantization = quantization_of(cells[0])
    base_key = records.base_key(cells[0].task, quantization, setting.fingerprint, data)
    with_base = not full and (setting.rescore or records.finished(base_key) is None)
    result = records.work / f"{keys[cells[0]]}.scores.json"
    spec = {
        "kind": "score",
        "task": cells[0].task,
        "base": str(records.weights(keys[cells[0]])) if full else setting.base,
        "quantization": quantization,
        "eval": str(data.evaluation),
        "adapters": {} if full else {keys[cell]: str(records.weights(keys[cell])) for cell in cells},
        "with_base": with_base or full,
        "resamples": RESAMPLES,
        "threads": setting.threads,
        "result": str(result),
    }
    _in_process(spec, result.with_suffix(".spec"), f"scoring {cells[0].task}", watcher.said)
    told = json.loads(result.read_text("utf-8"))
    if with_base:
        records.finish(
            base_key, {"task": cells[0].task, "quantization": quantization, "scores": told["scores"]["base"]}
        )
    for cell in cells:
        key = keys[cell]
        trained = records.trained(key)
        assert trained is not None
        record = {
            "task": cell.task,
            "variant": cell.variant,
            "recipe": cell.recipe.as_dict(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "threads": setting.threads,
            "processor": processor(),
            "evaluation": {
                "digest": data.evaluation_digest,
                "quantization": quantization,
                "in_one_batch_with": len(cells) + int(with_base) - 1,
                "seconds_of_all": told["seconds"],
            },
            "scores": told["scores"]["base" if full else key],
            **trained,
        }
        records.finish(key, record)
        if not setting.keep:
            shutil.rmtree(records.weights(key), ignore_errors=True)
        watcher.finished(cell, record)


def _in_process(spec: dict[str, Any], file: Path, what: str, said: Callable[[str], object]) -> None:
    """Run `training.sweep.child` on `spec`; its lines go to `said`. Raises `CellFailed`. It dies with this process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(spec), "utf-8")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if spec["threads"]:
        environment["OMP_NUM_THREADS"] = str(spec["threads"])
    last: deque[str] = deque(maxlen=_KEPT_LINES)
    with subprocess.Popen(
        [sys.executable, "-m", "training.sweep.child", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:
                last.append(line.rstrip())
                said(line.rstrip())

        reader = threading.Thread(target=read, name="sweep-reader", daemon=True)
        reader.start()
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        reader.join()
    file.unlink(missing_ok=True)
    if code or not Path(spec["result"]).is_file():
        raise CellFailed(f"{what}: its process ended with {code}; it said last: {' | '.join(list(last)[-4:])}")
