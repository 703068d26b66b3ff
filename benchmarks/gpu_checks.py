"""Every GPU kernel against float64 on fresh random inputs, outputs poisoned, at an 8B model's sizes."""

from __future__ import annotations

import torch

from benchmarks.gpu_bench import Bench, Report
from server.kernels.gpu import cuda, selfcheck


def correct(bench: Bench) -> Report:
    """What `selfcheck` finds in bfloat16 and float32; raises, naming all, where any kernel is wrong.

    Where it is one of those in CUDA C++ alone, the rows say so, and the sections behind this one go on with Triton's.
    """
    rows: list[dict[str, object]] = []
    wrong = _wrong(bench, rows, "all")
    if wrong and cuda.available():
        cuda.refuse()
        if not _wrong(bench, rows, "Triton alone"):
            return {"rows": rows}
    if wrong:
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
