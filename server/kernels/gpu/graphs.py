"""Captured steps: what was launched once, launched again as a whole, over the same memory.

A step of one token a sequence is some four hundred launches of a few microseconds each; started one by one from Python
they cost more than they compute. What may be captured reads its inputs from buffers that stay where they are, asks the
device for nothing, and does not depend on a value that Python saw.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

# What cuBLAS keeps at most for the two streams that capturing takes: 32 MiB for each that it has ever run on.
KEPT_BYTES = 2 * (32 << 20)


class Graphs(Protocol):
    """Where captured steps come from. The tests have one that works without a GPU."""

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Capture what `run` launches. The result launches it again and returns the same tensor as before, refilled.

        `run` is called twice or more, and what it writes must be the same each time. Only one captured step's result
        may be in use at a time: their intermediate memory is shared.
        """


class CudaGraphs:
    """CUDA graphs that share one pool of memory."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        with torch.cuda.device(self._device):
            self._pool = torch.cuda.graph_pool_handle()
            # One for all captures: a library keeps memory for every stream that it has ever run on.
            self._aside = torch.cuda.Stream()

    def capture(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See `Graphs.capture`."""
        with torch.cuda.device(self._device):
            here, aside = torch.cuda.current_stream(), self._aside
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                run()  # compiles kernels and lets libraries allocate, neither of which can be captured
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": another thread may copy an adapter meanwhile, which by default would spoil the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                out = run()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
