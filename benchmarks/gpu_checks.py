"""Every GPU kernel against float64 on fresh random inputs, outputs poisoned, at an 8B model's sizes."""

from __future__ import annotations

import torch

from benchmarks.gpu_bench import Bench, Report
from server.kernels.gpu import cuda, launch, selfcheck


def correct(bench: Bench) -> Report:
    """What `selfcheck` finds in bfloat16 and float32; raises, naming all, where any kernel is wrong.

    Before it raises, it looks whether they are right without early launches, and without the kernels in CUDA C++: where
    that mends it, the sections behind it are run that way, and the rows say so.
    """
    rows: list[dict[str, object]] = []
    wrong = _wrong(bench, rows, "all")
    if wrong:
        launch.overlap(False)
        if _wrong(bench, rows, "no early launches"):
            launch.overlap(True)
            cuda.refuse()
            if _wrong(bench, rows, "no CUDA C++"):
                raise AssertionError("; ".join(wrong))
    return {"rows": rows}


def _wrong(bench: Bench, rows: list[dict[str, object]], with_kernels: str) -> list[str]:
    wrong = []
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for found in selfcheck.findings(bench.device, dtype, selfcheck.TINY if bench.tiny else selfcheck.LARGE):
            rows.append(
                {
                    "kernel": found.kernel,
                    "dtype": kind,
                    "error": found.error,
                    "limit": found.limit,
                    "with": with_kernels,
                    "failure": found.failure[:200] or None,
                }
            )
            if not found.right:
                wrong.append(f"{found} ({kind})")
    return wrong
