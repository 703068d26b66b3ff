"""What the card does at best, and whole decode steps of the kernels alone, without an engine around them."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu_bench import Bench, Missing, Report
from benchmarks.gpu_model import LLAMA_1B, LLAMA_8B, TINY, Step
from benchmarks.gpu_variants import early

BF16 = torch.bfloat16


def ceilings(bench: Bench) -> Report:
    """What the card does at best: a copy (bytes read plus written), a bf16 product, a copy from pinned memory."""
    size = 1 << (12 if bench.tiny else 31)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    # By events, not as a graph: a copy within a graph is left to another engine, which has two thirds of the rate.
    bench.ceilings["bytes_per_second"] = 2 * size / copy_seconds(bench, source, target)
    n = 32 if bench.tiny else 8192
    a, b = (torch.randn(n, n, dtype=BF16, device=bench.device) for _ in range(2))
    product = bench.seconds([lambda: a @ b] * (1 if bench.tiny else 4))
    bench.ceilings["bf16_flops"] = 2 * n**3 / product
    host = torch.empty(size // 8, dtype=torch.uint8, pin_memory=bench.device == "cuda")
    upload = copy_seconds(bench, host, target[: size // 8])
    bench.ceilings["host_bytes_per_second"] = size / 8 / upload
    return {"rows": [{"ceiling": name, "per second": rate} for name, rate in bench.ceilings.items()]}


def copy_seconds(bench: Bench, source: Tensor, target: Tensor) -> float:
    """Median of copies to the device that no graph holds."""
    if bench.device == "cpu":
        return bench.seconds([lambda: target.copy_(source)])
    times: list[float] = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return sorted(times)[4]


def decode_steps(bench: Bench) -> Report:
    """A whole decode step of the kernels in one captured graph, context 320, against the bytes it must read."""
    if bench.tiny:
        cases = [(TINY, 2, True, adapters) for adapters in (0, 2)]
    else:
        cases = [(LLAMA_8B, rows, True, 0) for rows in (1, 8, 32)]
        cases += [(LLAMA_8B, 32, True, 32), (LLAMA_8B, 64, True, 0), (LLAMA_8B, 64, True, 64)]
        cases += [(LLAMA_8B, 32, False, 0), (LLAMA_8B, 32, False, 32)]
        cases += [(LLAMA_1B, 32, True, 0), (LLAMA_1B, 32, True, 32)]
    rows: list[dict[str, object]] = []
    alone: dict[tuple[str, int, bool], float] = {}
    for shape, batch, packed, adapters in cases:
        if bench.left() < 10:
            return {"rows": rows, "cut": f"no time left before {shape.name} at {batch} rows"}
        step = Step(shape, batch, 40 if bench.tiny else 320, bench.device, packed=packed, adapters=adapters)
        taken = bench.seconds([step.run])
        size = step.weight_bytes() + step.cache_bytes() + (step.adapter_bytes if adapters else 0)
        share = bench.share_of_bandwidth(size, taken)
        before = alone.setdefault((shape.name, batch, packed), taken)
        rows.append(
            {
                "model": f"{shape.name} {'NF4' if packed else 'bf16'}",
                "rows": batch,
                "adapters": adapters,
                "ms": taken * 1e3,
                "GB": size / 1e9,
                "of bandwidth": share,
                "times the floor": 1 / share if share else None,
                "kept share": before / taken if adapters else None,
            }
        )
        del step
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return {"rows": rows}


def profile(bench: Bench) -> Report:
    """Where the time of a decode step goes, kernel by kernel, none overlapping another; microseconds of one step."""
    if bench.device == "cpu":
        raise Missing("the profiler of kernels needs a GPU")
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    rows: list[dict[str, object]] = []
    for batch, count in ((1, 0), (8, 0), (32, 32)):
        step = Step(LLAMA_8B, batch, 320, bench.device, packed=True, adapters=count)
        with early(False):
            step.run()
            torch.cuda.synchronize()
            with recorded(activities=[ProfilerActivity.CUDA]) as record:
                for _ in range(3):
                    step.run()
                torch.cuda.synchronize()
        for event in sorted(record.key_averages(), key=lambda event: -event.device_time_total)[:9]:
            name = event.key[:60]
            rows.append(
                {
                    "rows": batch,
                    "adapters": count,
                    "kernel": name,
                    "launches": event.count // 3,
                    "us": event.device_time_total / 3,
                }
            )
        del step
        torch.cuda.empty_cache()
    return {"rows": rows}
