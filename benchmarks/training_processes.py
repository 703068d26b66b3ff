"""The planner's memory against the processes of sweeps: its own numbers, or numbers fitted on some cells.

Unlike `benchmarks.training_memory`, which makes the allocator give every freed block back, these are processes as
`hub train` runs them. What they hold beyond the rehearsed tensors is taken as a constant, a share of the activations
and, in float32, a share of the logits (`training.left_behind`). `--fit` finds these numbers anew on the cells whose
names have all the given words, by least squares of the relative error, for runs with and without an NF4 base apart;
the other cells check them.

    python -m benchmarks.training_processes training/experiments/[15]-*.yaml --fit seed --leave-out aws-summary \\
        --page training_processes
    python -m benchmarks.training_processes training/experiments/[1-5]-*.yaml --fit 1-methods "seed 0" \\
        --results docs/results/float32 --page training_processes_float32
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Process:
    """One cell: bytes above what the process held before the base was loaded."""

    name: str  # plan, task, variant, seed
    precision: str
    nf4: bool
    checkpointing: bool
    measured: int
    tensors: int  # rehearsed, and the mapped file of an NF4 base
    activations: int
    logits: int
    planned: int  # by the planner as it is
    operations: float  # of the whole training
    seconds: float  # of the processor, in the optimizer loop

    def features(self) -> list[float]:
        """What the numbers are factors of."""
        return [1.0, self.activations, self.logits] if self.precision == "float32" else [1.0, self.activations]


def measured(plan_file: Path, results: Path, size: str) -> dict[str, Process]:
    """Every finished cell of the plan by its key, with its rehearsal."""
    import torch

    from hub.base import base_identity, locate_base
    from training.left_behind import left_behind
    from training.planner import Machine, mapped_bytes
    from training.recipe import PRECISIONS
    from training.sweep.estimate import Estimator
    from training.sweep.plan import SweepPlan
    from training.sweep.records import Records
    from training.sweep.run import prepare_data

    plan, records = SweepPlan.read(plan_file, size), Records(results)
    data = prepare_data(plan, records)
    identity, _ = base_identity(plan.base)
    directory = locate_base(plan.base).directory
    estimators = {}
    for name in ("bfloat16", "float32"):  # what a cell's products were in, whatever its recipe left open
        machine = Machine("cpu", "cpu", 0, 0, 1.0, getattr(torch, name))
        estimators[name] = Estimator(directory, dict.fromkeys(PRECISIONS, machine).__getitem__)
    found = {}
    for cell in plan.cells:
        key = records.key(cell, identity.fingerprint or "", data[cell.task])
        record = records.finished(key)
        if record is None or record["resumed"]:
            continue
        precision, recipe = record["metrics"]["precision"], cell.recipe
        rehearsal = estimators[precision].rehearsal(cell, data)
        tensors = rehearsal.peak + mapped_bytes(directory, recipe.method, rehearsal)
        left = left_behind(recipe.method, recipe.gradient_checkpointing, getattr(torch, precision)).of(rehearsal)
        found[key] = Process(
            name=f"{plan_file.stem} · {cell.text}",
            precision=precision,
            nf4=recipe.method == "qlora",
            checkpointing=recipe.gradient_checkpointing,
            measured=record["peak_bytes"] - record["process_bytes"],
            tensors=tensors,
            activations=rehearsal.activations,
            logits=rehearsal.logits,
            planned=round(tensors + left),
            operations=estimators[precision].operations(cell, data),
            seconds=record["metrics"]["cpu_seconds"],
        )
    return found


def fit(cells: list[Process]) -> list[float]:
    """The numbers that make (tensors + numbers · features) / measured - 1 least, in squares."""
    rows = np.array([np.array(cell.features()) / cell.measured for cell in cells])
    wanted = np.array([1.0 - cell.tensors / cell.measured for cell in cells])
    scale = np.abs(rows).max(axis=0)
    return [float(x) for x in np.linalg.lstsq(rows / scale, wanted, rcond=None)[0] / scale]


def times(cells: list[Process], fitted: list[Process]) -> list[str]:
    """The page's part on time: operations over one speed for all, and one factor for an NF4 base."""
    of = {cell: cell.operations / cell.seconds for cell in cells}
    speed = statistics.median(of[cell] for cell in fitted if not cell.nf4)
    factor = speed / statistics.median([of[cell] for cell in fitted if cell.nf4] or [speed])
    errors = {cell: cell.operations / speed * (factor if cell.nf4 else 1.0) / cell.seconds - 1 for cell in cells}
    checks = sorted(abs(error) for cell, error in errors.items() if cell not in fitted) or [0.0]
    near = sum(error <= 0.15 for error in checks)
    return [
        "## Time",
        "",
        f"Processor seconds of the optimizer loop: counted operations over {speed / 1e9:.1f} GFLOP/s,",
        f"times {factor:.2f} with an NF4 base, both medians of the {len(fitted)} cells above.",
        f"Of the {len(checks)} others {near} are within 15 %, the worst is {checks[-1]:.0%} off, the median "
        f"{statistics.median(checks):.0%}.",
        "",
        "| cell | predicted s | measured s | error | |",
        "|---|---|---|---|---|",
        *(
            f"| {cell.name} | {cell.seconds * (1 + error):,.0f} | {cell.seconds:,.0f} | {error:+.0%} "
            f"| {'fit' if cell in fitted else 'check'} |"
            for cell, error in errors.items()
        ),
        "",
    ]


HEAD = """# Training processes: memory predicted and measured

`{command}`

SmolLM2-135M, one thread, Linux with glibc's allocator as it comes. MB above what the process held before the base was
loaded (interpreter and libraries).
"""


def page(cells: list[Process], words: list[str], command: str, left_out: str = "") -> str:
    """The result file.

    Fitted on the cells with all `words` in their names and not `left_out`, if any; no words: the planner's own numbers.
    """
    fitted = [
        cell for cell in cells
        if words and all(word in cell.name for word in words) and not cell.checkpointing
        and not (left_out and left_out in cell.name)
    ]  # fmt: skip
    predicted = {cell: float(cell.planned) for cell in cells}
    told = []
    if fitted:
        cells = [cell for cell in cells if cell.precision == fitted[0].precision]
        for nf4 in (False, True):
            numbers = fit([cell for cell in fitted if cell.nf4 == nf4])
            for cell in cells:
                if cell.nf4 == nf4 and not (cell.checkpointing and cell.precision == "float32"):
                    predicted[cell] = cell.tensors + float(np.dot(numbers, cell.features()))
            of = "Base in NF4" if nf4 else f"Base in {fitted[0].precision}"
            shares = [f"{x:.3f} × {what}" for x, what in zip(numbers[1:], ("activations", "logits"), strict=False)]
            told.append(f"{of}: tensors + {' + '.join([f'{numbers[0] / 1e6:.0f} MB', *shares])}.")
    errors = {cell: predicted[cell] / cell.measured - 1 for cell in cells}
    checks = [abs(error) for cell, error in errors.items() if cell not in fitted]
    if fitted:
        but = f" but those of {left_out}" if left_out else ""
        told.insert(0, f"Fitted on the {len(fitted)} cells of {', '.join(words)}{but}:")
        told.append(
            f"On the {len(checks)} other cells, which had no part in it, the worst error is "
            f"{max(checks, default=0):.1%}, the mean {sum(checks) / max(1, len(checks)):.1%}."
        )
        if any(cell.checkpointing for cell in cells) and fitted[0].precision == "float32":
            told.append("With gradient checkpointing: the planner's own numbers, which rest on few cells.")
    else:
        told.append(
            f"Predicted by the planner as it is. Of {len(checks)} cells the worst error is "
            f"{max(checks, default=0):.1%}, the mean {sum(checks) / max(1, len(checks)):.1%}."
        )
    lines = [
        HEAD.format(command=command),
        *told,
        "",
        "| cell | precision | tensors alone | predicted | measured | error | the planner's | |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {cell.name} | {cell.precision} | {cell.tensors / 1e6:,.0f} | {predicted[cell] / 1e6:,.0f} "
            f"| {cell.measured / 1e6:,.0f} | {error:+.1%} | {cell.planned / cell.measured - 1:+.1%} "
            f"| {'fit' if cell in fitted else 'check' if fitted else ''} |"
            for cell, error in errors.items()
        ),
        "",
        *(times(cells, fitted) if fitted else []),
    ]
    return "\n".join(lines)


def main() -> None:
    """Read the cells, write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("plans", type=Path, nargs="+")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--size", default="small")
    parser.add_argument("--fit", nargs="+", default=[], help="words; without: the planner's own numbers are checked")
    parser.add_argument("--leave-out", default="", metavar="WORD", help="of these cells none is fitted")
    parser.add_argument("--page", help="write the tables to benchmarks/results under this name")
    given = parser.parse_args()
    found: dict[str, Process] = {}
    for plan in given.plans:
        shared = measured(plan, given.results, given.size)
        found |= {key: cell for key, cell in shared.items() if key not in found}
    cells = list(found.values())
    command = shlex.join(["python", "-m", "benchmarks.training_processes", *sys.argv[1:]])
    print(page(cells, given.fit, command, given.leave_out))
    if given.page:
        told = json.dumps([asdict(cell) for cell in cells], indent=1) + "\n"
        (RESULTS / f"{given.page}.json").write_text(told, "utf-8")
        (RESULTS / f"{given.page}.md").write_text(page(cells, given.fit, command, given.leave_out), "utf-8")


if __name__ == "__main__":
    main()
