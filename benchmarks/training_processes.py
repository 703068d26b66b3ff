"""The planner's memory against the processes of sweeps: its own figures, or fitted on one task and checked on others.

Unlike `benchmarks.training_memory`, which makes the allocator give every freed block back, these are processes as
`hub train` runs them. What they hold beyond the rehearsed tensors is taken as a + b × activations, b being 0 where
nothing is cast (float32, not NF4); a and b are fitted (least squares) on the cells of one task alone, or, without one,
the planner's own.

    python -m benchmarks.training_processes training/experiments/1-methods.yaml --fit sentiment
    python -m benchmarks.training_processes training/experiments/1-methods.yaml training/experiments/4-qlora.yaml \\
        --results docs/results/float32 --page training_processes_float32
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Process:
    """One cell: bytes above what the process held before the base was loaded."""

    task: str
    variant: str
    precision: str
    measured: int
    tensors: int  # rehearsed, and the mapped file of an NF4 base
    activations: int  # that count: 0 where nothing is cast
    planned: int  # by the planner as it is


def measured(plan_file: Path, results: Path, size: str) -> list[Process]:
    """Every finished cell of the plan, with its rehearsal."""
    import torch

    from hub.base import base_identity, locate_base
    from training.planner import Machine, casts, kept_by_allocator, mapped_bytes
    from training.sweep.estimate import Estimator
    from training.sweep.plan import SweepPlan
    from training.sweep.records import Records
    from training.sweep.run import prepare_data

    plan, records = SweepPlan.read(plan_file, size), Records(results)
    data = prepare_data(plan, records)
    identity, _ = base_identity(plan.base)
    directory = locate_base(plan.base).directory
    estimators = {
        name: Estimator(directory, Machine("cpu", "cpu", 0, 0, 1.0, getattr(torch, name)))
        for name in ("bfloat16", "float32")
    }
    found = []
    for cell in plan.cells:
        record = records.finished(records.key(cell, identity.fingerprint or "", data[cell.task]))
        if record is None or record["resumed"]:
            continue
        precision = record["metrics"]["precision"]
        rehearsal = estimators[precision].rehearsal(cell, data)
        tensors = rehearsal.peak + mapped_bytes(directory, cell.recipe.method, rehearsal)
        held = record["peak_bytes"] - record["process_bytes"]
        dtype, recipe = getattr(torch, precision), cell.recipe
        counted = rehearsal.activations if casts(recipe.method, dtype) else 0
        kept = kept_by_allocator(recipe.method, recipe.gradient_checkpointing, rehearsal.activations, dtype)
        found.append(Process(cell.task, cell.text, precision, held, tensors, counted, round(tensors + kept)))
    return found


def fit(cells: list[Process]) -> tuple[float, float]:
    """(a in bytes, b) of measured − tensors = a + b × activations, by least squares."""
    rows = np.array([[1.0, cell.activations] for cell in cells])
    (a, b), *_ = np.linalg.lstsq(rows, np.array([cell.measured - cell.tensors for cell in cells], float), rcond=None)
    return float(a), float(b)


HEAD = """# Training processes: memory predicted and measured

`{command}`

SmolLM2-135M, one thread, Linux with glibc's allocator as it comes. MB above what the process held before the base was
loaded (interpreter and libraries).
"""


def page(cells: list[Process], task: str, command: str) -> str:
    """The result file; `task`: whose cells a and b are fitted on, "" for the planner as it is."""
    from training.planner import ALLOCATOR, ALLOCATOR_SHARE

    if task:
        fitted = [cell for cell in cells if cell.task == task]
        cells = [cell for cell in cells if cell.precision == fitted[0].precision]
        a, b = fit(fitted)
        predicted = {cell: cell.tensors + a + b * cell.activations for cell in cells}
    else:
        predicted = {cell: float(cell.planned) for cell in cells}
    errors = {cell: predicted[cell] / cell.measured - 1 for cell in cells}
    checks = [abs(error) for cell, error in errors.items() if cell.task != task]
    if task:
        told = [
            f"Predicted: rehearsed tensors + a + b × activations, fitted on the {len(cells) - len(checks)} cells of "
            f"{task} alone:",
            f"a = {a / 1e6:.0f} MB, b = {b:.3f} (the planner uses {ALLOCATOR / 1e6:.0f} MB and {ALLOCATOR_SHARE:g}).",
            f"On the {len(checks)} cells of other tasks, which had no part in it, the worst error is "
            f"{max(checks, default=0):.1%}, the mean {sum(checks) / max(1, len(checks)):.1%}.",
        ]
    else:
        told = [
            f"Predicted by the planner as it is. Of {len(checks)} cells the worst error is "
            f"{max(checks, default=0):.1%}, the mean {sum(checks) / max(1, len(checks)):.1%}."
        ]
    lines = [
        HEAD.format(command=command),
        *told,
        "",
        "| cell | precision | tensors alone | predicted | measured | error | |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {cell.variant} | {cell.precision} | {cell.tensors / 1e6:,.0f} | {predicted[cell] / 1e6:,.0f} "
            f"| {cell.measured / 1e6:,.0f} | {error:+.1%} | {'fit' if cell.task == task else 'check' if task else ''} |"
            for cell, error in errors.items()
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the cells, write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--size", default="small")
    parser.add_argument("--fit", default="", help="a task; without: the planner's own figures are checked")
    parser.add_argument("--page", help="write the tables to benchmarks/results under this name")
    given = parser.parse_args()
    cells = list(dict.fromkeys(cell for plan in given.plans for cell in measured(plan, given.results, given.size)))
    command = shlex.join(["python", "-m", "benchmarks.training_processes", *sys.argv[1:]])
    print(page(cells, given.fit, command))
    if given.page:
        told = json.dumps([asdict(cell) for cell in cells], indent=1) + "\n"
        (RESULTS / f"{given.page}.json").write_text(told, "utf-8")
        (RESULTS / f"{given.page}.md").write_text(page(cells, given.fit, command), "utf-8")


if __name__ == "__main__":
    main()
