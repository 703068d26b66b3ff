"""The planner's memory against the processes of sweeps: fitted on one task's cells, checked on the others'.

Unlike `benchmarks.training_memory`, which makes the allocator give every freed block back, these are processes as
`hub train` runs them. What they hold beyond the rehearsed tensors is taken as a + b × activations, b being 0 where
nothing is cast (float32, not NF4); a and b are fitted (least squares) on the cells of one task alone, or, without one,
the planner's own.

    python -m benchmarks.training_processes training/experiments/1-methods.yaml --results docs/results --fit sentiment
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

PAGE = Path(__file__).parent / "results" / "training_processes"


@dataclass(frozen=True)
class Process:
    """One cell: bytes above what the process held before the base was loaded."""

    task: str
    variant: str
    precision: str
    measured: int
    tensors: int  # rehearsed, and the mapped file of an NF4 base
    activations: int  # that count: 0 where nothing is cast


def measured(plan_file: Path, results: Path, size: str) -> list[Process]:
    """Every finished cell of the plan, with its rehearsal."""
    import torch

    from hub.base import base_identity, locate_base
    from training.planner import Machine, casts, mapped_bytes
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
        counted = rehearsal.activations if casts(cell.recipe.method, getattr(torch, precision)) else 0
        found.append(Process(cell.task, cell.variant, precision, held, tensors, counted))
    return found


def fit(cells: list[Process]) -> tuple[float, float]:
    """(a in bytes, b) of measured − tensors = a + b × activations, by least squares."""
    rows = np.array([[1.0, cell.activations] for cell in cells])
    (a, b), *_ = np.linalg.lstsq(rows, np.array([cell.measured - cell.tensors for cell in cells], float), rcond=None)
    return float(a), float(b)


def page(cells: list[Process], task: str) -> str:
    """The result file; `task`: whose cells a and b are fitted on, "" for the planner's own."""
    from training.planner import ALLOCATOR, ALLOCATOR_SHARE

    a, b = fit([cell for cell in cells if cell.task == task]) if task else (float(ALLOCATOR), ALLOCATOR_SHARE)
    errors = {cell: (cell.tensors + a + b * cell.activations) / cell.measured - 1 for cell in cells}
    checks = [abs(error) for cell, error in errors.items() if cell.task != task]
    lines = [
        "# Training processes: memory predicted and measured",
        "",
        "`python -m benchmarks.training_processes PLAN --fit TASK`, on the cells of docs/results: SmolLM2-135M, one",
        "thread, Linux with glibc's allocator as it comes. MB above what the process held before the base was loaded",
        "(interpreter and libraries). Predicted: rehearsed tensors + a + b × activations; without the last in float32",
        "but for QLoRA.",
        "",
        f"Fitted on the {len(cells) - len(checks)} cells of {task} alone: a = {a / 1e6:.0f} MB, b = {b:.3f}",
        f"(the planner uses {ALLOCATOR / 1e6:.0f} MB and {ALLOCATOR_SHARE:g}).",
        f"On the {len(checks)} cells of other tasks, which had no part in it, the worst error is "
        f"{max(checks, default=0):.1%}, the mean {sum(checks) / max(1, len(checks)):.1%}.",
        "",
        "| task | cell | precision | tensors alone | predicted | measured | error | |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {cell.task} | {cell.variant} | {cell.precision} | {cell.tensors / 1e6:,.0f} "
            f"| {(cell.tensors + a + b * cell.activations) / 1e6:,.0f} | {cell.measured / 1e6:,.0f} | {error:+.1%} "
            f"| {'fit' if cell.task == task else 'check'} |"
            for cell, error in errors.items()
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the cells, write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("plan", type=Path)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--size", default="small")
    parser.add_argument("--fit", default="sentiment", help="a task; empty: the planner's numbers are checked")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    cells = measured(given.plan, given.results, given.size)
    print(page(cells, given.fit))
    if given.write:
        PAGE.with_suffix(".json").write_text(json.dumps([asdict(cell) for cell in cells], indent=1) + "\n", "utf-8")
        PAGE.with_suffix(".md").write_text(page(cells, given.fit), "utf-8")


if __name__ == "__main__":
    main()
