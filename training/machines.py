"""Machines a run can be planned for: this one, measured, or a GPU by name."""

from __future__ import annotations

import os
import time

import torch

from training.planner import Machine
from training.trainable import bfloat16_is_fast

# Name → (memory in GB, dense bfloat16 (t4: float16) TFLOP/s by its maker).
GPUS: dict[str, tuple[int, float]] = {
    "t4": (16, 65.0),
    "l4": (24, 121.0),
    "rtx-4090": (24, 165.0),
    "a100-40": (40, 312.0),
    "a100": (80, 312.0),
    "h100": (80, 989.0),
    "h200": (141, 989.0),
}
GPU_SHARE = 0.35  # of the maker's figure that training of a few billion parameters reaches; an assumption
# Of a matrix product's speed that a whole step reaches on a CPU: in float32 46 of 73 GFLOP/s (one thread, AVX2; see
# benchmarks/results/training_processes_float32.md); in bfloat16 an assumption as well.
CPU_SHARE = {torch.float32: 0.63, torch.bfloat16: 0.25}
_CUDA_CONTEXT = 600_000_000
_PROCESS = 660_000_000  # Python with torch, transformers, peft and trl imported; measured


def gpu(name: str, memory: int | None = None) -> Machine:
    """The GPU of that name, with `memory` bytes instead of its own where given."""
    gigabytes, tflops = GPUS[name]
    return Machine(
        name=name,
        device="cuda",
        memory=memory or gigabytes * 10**9,
        overhead=_CUDA_CONTEXT,
        flops=tflops * 1e12 * GPU_SHARE,
        dtype=torch.bfloat16,
    )


def this_machine(hidden: int, inner: int, memory: int | None = None) -> Machine:
    """The CPU at hand: its memory, and its speed at a product of the base's shape (a second's measurement)."""
    dtype = torch.bfloat16 if bfloat16_is_fast("cpu") else torch.float32
    x, w = torch.randn(512, hidden).to(dtype), torch.randn(hidden, inner).to(dtype)
    x @ w
    best, until = 0.0, time.monotonic() + 0.5
    while time.monotonic() < until:
        started = time.perf_counter()
        for _ in range(5):
            x @ w
        best = max(best, 5 * 2 * 512 * hidden * inner / (time.perf_counter() - started))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine("this machine's CPU", "cpu", memory or physical, _PROCESS, best * CPU_SHARE[dtype], dtype)
