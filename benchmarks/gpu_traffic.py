"""Adapters on their way to the device while the engine decodes, and more of them than fit."""

from __future__ import annotations

import random
import threading
import time

import torch

from benchmarks.gpu_bench import Bench, Report
from benchmarks.gpu_engine import NEW, PROMPT, packed_world
from benchmarks.gpu_steps import copy_seconds


def swap(bench: Bench) -> Report:
    """Adapters copied from host memory while 32 sequences decode: each against the measured copy rate, and the steps
    that came later than the others because of it."""
    world = packed_world(bench)
    rows, swaps, new = (2, 1, 4) if bench.tiny else (32, 12, 400)
    size = world.rank * world.row_bytes
    raw = torch.empty(size, dtype=torch.uint8, pin_memory=bench.device == "cuda")
    floor = copy_seconds(bench, raw, torch.empty_like(raw, device=bench.device))
    uses = [str(row % 2) for row in range(rows)]
    world.run(uses, 3 if bench.tiny else PROMPT, 2)
    world.steps.loads.clear()
    spent: list[tuple[float, float]] = []

    def load() -> None:
        time.sleep(0.1 if bench.tiny else 0.5)  # the prompts are through
        for number in range(swaps):
            digest = f"swapped {number}"
            begun = time.monotonic()
            world.engine.adapters.load(digest, f"bench/{digest}@1")
            spent.append((begun, time.monotonic()))
            time.sleep(0.05)

    loader = threading.Thread(target=load)
    loader.start()
    world.run(uses, 3 if bench.tiny else PROMPT, new)
    loader.join()
    steps = [s for s in world.steps.seen if s.tokens == s.sequences == rows]
    copying = [(end - seconds, end) for end, seconds in world.steps.loads]
    beside = [s for s in steps if _overlaps(s.ended - s.seconds, s.ended, spent)]
    quiet = [s.seconds for s in steps if s not in beside]
    usual = sorted(quiet)[len(quiet) // 2] if quiet else 0.0
    during = [s for s in beside if _overlaps(s.ended - s.seconds, s.ended, copying)]
    copies = sorted(seconds for _, seconds in world.steps.loads)
    return {
        "rows": [
            {
                "adapter MB": size / 1e6,
                "swaps": len(copies),
                "copy ms, median": copies[len(copies) // 2] * 1e3,
                "floor ms": floor * 1e3,
                "times the floor": copies[len(copies) // 2] / floor,
                "steps beside copies": len(during),
                "of these > 5 % late": sum(s.seconds > 1.05 * usual for s in during),
                "steps beside parsing": len(beside) - len(during),
                "of these late": sum(s.seconds > 1.05 * usual for s in beside if s not in during),
                "quiet > 5 % late": sum(seconds > 1.05 * usual for seconds in quiet),
                "quiet steps": len(quiet),
            }
        ]
    }


def _overlaps(start: float, end: float, stretches: list[tuple[float, float]]) -> bool:
    return any(start < last and first < end for first, last in stretches)


def registered(bench: Bench) -> Report:
    """Requests whose adapters are drawn by zipf 1.2 from 2,000, room for 64 on the device, beside the same number of
    requests to 32 adapters that all stay there."""
    world = packed_world(bench)
    known, many, prompt, new = (20, 4, 3, 2) if bench.tiny else (2000, 192, PROMPT, NEW)
    weights = [rank**-1.2 for rank in range(1, known + 1)]
    fixed = [str(number % (2 if bench.tiny else 32)) for number in range(many)]
    _, mixed = world.run(fixed, prompt, new)
    rows: list[dict[str, object]] = []
    # First nobody has been fetched; then the commonest lie in host memory, as after a while of serving.
    for state in ("cold", "warm"):
        if bench.left() < 10 and rows:
            return {"rows": rows, "cut": f"no time left before {state}"}
        drawn = random.Random().choices(range(known), weights, k=many)
        asked = world.requests([f"registered {number}" for number in drawn], prompt, new)
        loads = len(world.steps.loads)
        started = time.perf_counter()
        answers = world.engine.generate(asked)
        taken = time.perf_counter() - started
        failed = next((answer.error for answer in answers if answer.error is not None), None)
        if failed is not None:
            raise failed
        rows.append(
            {
                "registered": known,
                "host memory": state,
                "requests": many,
                "adapters used": len(set(drawn)),
                "copies to the device": len(world.steps.loads) - loads,
                "tokens/s": many * new / taken,
                "tokens/s, 32 resident": many * new / mixed,
                "share": mixed / taken,
            }
        )
    return {"rows": rows}
