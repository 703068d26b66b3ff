"""What training holds at its peak and how long it takes, measured, beside what `hub advise` predicts.

Each run is a process of its own: libraries imported and one small product made, then the resident set is noted, then
`training.finetune.train` runs three optimizer steps on rows of equal length. The kernel's high-water mark (VmHWM, set
back once the base is loaded) less what was noted is the measurement; the mark before that is the loading's. Freed
blocks go back to the system at once (MALLOC_MMAP_THRESHOLD_), so that the mark is the run's, not the allocator's.

    python -m benchmarks.training_memory --threads 2 [--write]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from training.trainable import Method, Trainable

RESULTS = Path(__file__).parent / "results" / "training_memory"


@dataclass(frozen=True)
class Case:
    """One run. `fit`: its excess over the tensors sets what the planner adds; the others only check it."""

    method: Method
    checkpointing: bool
    words: int  # of a row
    rank: int = 16
    fit: bool = False


# Fitted on three runs of one shape; checked on other shapes, ranks, and with checkpointing.
CASES = (
    Case("full", False, 40, fit=True),
    Case("lora", False, 40, fit=True),
    Case("qlora", False, 40, fit=True),
    Case("full", True, 40),
    Case("lora", True, 40),
    Case("qlora", True, 40),
    Case("lora", False, 16),
    Case("lora", False, 100),
    Case("qlora", False, 100),
    Case("full", False, 100),
    Case("lora", False, 40, rank=64),
    Case("qlora", True, 100, rank=64),
)


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def make_data(path: Path, words: int, rows: int = 24) -> None:
    """Rows of one length, a third of which is answer."""
    from training.data import Example, write_jsonl

    ask, answer = words * 2 // 3, words // 3
    write_jsonl(
        path, [Example.of(user=f"{row + 10} " + "sun " * ask, answer=" ".join(["yes"] * answer)) for row in range(rows)]
    )


def run_one(base: str, case: Case, threads: int) -> dict[str, float]:
    """Measure one case in this process."""
    import warnings

    warnings.simplefilter("ignore")
    import bitsandbytes  # noqa: F401  # imported here, so that it is not measured
    import peft  # noqa: F401
    import torch
    import trl  # noqa: F401
    from rich.console import Console

    import training.trainer  # noqa: F401
    from hub.base import locate_base
    from hub.base_identity import BaseIdentity
    from training import finetune
    from training.finetune import Plan
    from training.planner import GROWTH, flops_of, peak_returned, read_data
    from training.presets import named_recipe
    from training.rehearsal import rehearse
    from training.trainable import bfloat16_is_fast, make_trainable

    torch.set_num_threads(threads)
    torch.ones(256, 256).bfloat16() @ torch.ones(256, 256).bfloat16()
    directory = locate_base(base).directory
    recipe = named_recipe("demo").but(
        method=case.method,
        gradient_checkpointing=case.checkpointing,
        hold_out=0.0,
        max_length=512,
        batch=8,
        rank=case.rank,
        alpha=2 * case.rank,
    )
    with tempfile.TemporaryDirectory() as scratch:
        make_data(Path(scratch) / "data.jsonl", case.words)
        before = resident("VmRSS")
        plan = Plan(
            data=Path(scratch) / "data.jsonl",
            base=BaseIdentity(base, None, None),
            base_directory=directory,
            recipe=recipe,
            out=Path(scratch) / "out",
            method=case.method,
            threads=threads,
        )
        loading: list[int] = []

        def weighed(*args: Any) -> Trainable:
            made = make_trainable(*args)
            loading.append(resident("VmHWM") - before)
            Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
            return made

        with patch.object(finetune, "make_trainable", weighed):
            facts = finetune.train(plan, Console(file=Path(os.devnull).open("w"))).facts  # noqa: SIM115
        measured = resident("VmHWM") - before
        data = read_data(plan.data, directory, recipe)
        started = time.monotonic()
        dtype = torch.bfloat16 if bfloat16_is_fast("cpu") else torch.float32
        rehearsal = rehearse(directory, case.method, recipe, data.longest, "cpu", dtype)
        return {
            "rows": data.longest.rows,
            "length": data.longest.length,
            "process_bytes": before,
            "measured_bytes": measured,
            "loading_bytes": loading[0],
            "predicted_bytes": peak_returned(directory, case.method, rehearsal),
            "predicted_growth": GROWTH,
            "predicted_tensors": rehearsal.peak,
            "predicted_weights": rehearsal.weights,
            "seconds": facts.metrics["seconds"],
            "flops": flops_of(rehearsal, data, recipe),
            "rehearsal_seconds": round(time.monotonic() - started, 1),
        }


def main() -> None:
    """Run every case, or with --case one of them in this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--case", type=json.loads, help="Run this one in this process.")
    given = parser.parse_args()
    if given.case:
        print(json.dumps(run_one(given.base, Case(**given.case), given.threads)))
        return
    rows: list[dict[str, Any]] = []
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.training_memory", "--base", given.base]
        command += ["--threads", str(given.threads), "--case", json.dumps(asdict(case))]
        bounded = {
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "OMP_NUM_THREADS": str(given.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        told = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **bounded}, check=False)
        if told.returncode:
            sys.exit(told.stderr)
        row = {**asdict(case), **json.loads(told.stdout.splitlines()[-1])}
        rows.append(row)
        print(line(row, row["predicted_growth"]), flush=True)
    if given.write:
        told_all = {"base": given.base, "threads": given.threads, "runs": rows}
        RESULTS.with_suffix(".json").write_text(json.dumps(told_all, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(page(given.base, given.threads, rows))


def fitted(rows: list[dict[str, Any]]) -> float:
    """What a process grows by beside the tensors, from the runs that are there to say it: their mean excess."""
    excess: list[float] = [
        row["measured_bytes"] - (row["predicted_bytes"] - row["predicted_growth"]) for row in rows if row["fit"]
    ]
    return sum(excess) / len(excess)


def line(row: dict[str, Any], growth: float) -> str:
    """One row of the table, with `growth` bytes in place of what the planner added."""
    predicted = row["predicted_bytes"] - row["predicted_growth"] + growth
    error = predicted / row["measured_bytes"] - 1
    return (
        f"| {row['method']}{'' if row['method'] == 'full' else ' r' + str(row['rank'])} "
        f"| {'yes' if row['checkpointing'] else 'no'} | {row['rows']} × {row['length']} "
        f"| {predicted / 1e6:,.0f} | {row['measured_bytes'] / 1e6:,.0f} | {error:+.1%} "
        f"| {'fit' if row['fit'] else 'check'} | {row['flops'] / row['seconds'] / 1e9:.0f} |"
    )


def page(base: str, threads: int, rows: list[dict[str, Any]]) -> str:
    """The result file."""
    growth = fitted(rows)
    errors = [
        (row["predicted_bytes"] - row["predicted_growth"] + growth) / row["measured_bytes"] - 1
        for row in rows
        if not row["fit"]
    ]
    worst = max(errors, key=abs)
    head = [
        f"# Training memory, predicted and measured: {base}, {threads} thread{'s' if threads > 1 else ''}",
        "",
        "`python -m benchmarks.training_memory --write`. Measured: VmHWM of a process of its own less its resident set",
        "before the base was loaded, three optimizer steps. Predicted: the rehearsed tensors (`training.rehearsal`),",
        "for NF4 the mapped weights file, and what a process on a CPU grows by besides. In MB, above the process's own",
        f"{rows[0]['process_bytes'] / 1e6:,.0f}.",
        "",
        f"**That growth is the only fitted number**: {growth / 1e6:.0f} MB, the mean excess of the "
        f"{sum(row['fit'] for row in rows)} runs marked `fit`; the planner uses "
        f"{rows[0]['predicted_growth'] / 1e6:.0f} MB. The {len(errors)} runs marked `check`",
        f"had no part in it: there the worst error is {worst:+.1%}, the mean absolute one "
        f"{sum(map(abs, errors)) / len(errors):.1%}.",
        "One base, on a CPU; nothing on a GPU.",
        "",
        "| method | checkpointing | batch × tokens | predicted | measured | error | | GFLOP/s reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(line(row, growth) for row in rows), ""])


if __name__ == "__main__":
    main()
