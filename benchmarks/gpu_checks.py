"""Every GPU kernel against float64 on fresh random inputs, outputs poisoned, at an 8B model's sizes."""

from __future__ import annotations

import torch

from benchmarks.gpu_bench import Bench, Report
from server.kernels.gpu import selfcheck


def correct(bench: Bench) -> Report:
    """What `selfcheck` finds in bfloat16 and float32; raises, naming all, where any kernel is wrong."""
    rows, wrong = [], []
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for found in selfcheck.findings(bench.device, dtype, selfcheck.TINY if bench.tiny else selfcheck.LARGE):
            rows.append({"kernel": found.kernel, "dtype": kind, "error": found.error, "limit": found.limit})
            if not found.right:
                wrong.append(f"{found} ({kind})")
    if wrong:
        raise AssertionError("; ".join(wrong))
    return {"rows": rows}
