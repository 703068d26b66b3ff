"""What the sections of benchmarks/gpu.py share: the device, the clock, and the card's measured ceilings."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Report = dict[str, Any]


class Missing(Exception):
    """A section cannot run here; the text says what it lacks."""


@dataclass
class Bench:
    """What sections share: the device, toy shapes or real ones, the clock, and the ceilings once they are measured."""

    device: str
    tiny: bool
    until: float = 0.0
    ceilings: dict[str, float] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)  # engines that sections share, by name
    figures: dict[str, float] = field(default_factory=dict)  # what later sections compare with
    # The fastest way of an NF4 product of (rows, out, width): seconds, and its cut or None for Triton's kernel.
    cuts: dict[tuple[int, int, int], tuple[float, Any]] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds left to the section that runs."""
        return self.until - time.monotonic()

    def seconds(self, calls: Sequence[Callable[[], object]], rounds: int = 7) -> float:
        """Median seconds of one of `calls`, which do the same over different memory, replayed as one captured graph.

        Give enough of them that what they read does not fit the cache.
        """
        if self.device == "cpu":
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # compiles, and fills the allocator
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        times: list[float] = []
        for _ in range(rounds):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / len(calls))
        return sorted(times)[rounds // 2]

    def share_of_bandwidth(self, size: float, seconds: float) -> float | None:
        """Bytes over seconds as a share of the measured copy rate."""
        ceiling = self.ceilings.get("bytes_per_second")
        return size / seconds / ceiling if ceiling else None
