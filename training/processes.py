"""One run in several processes, as `accelerate launch` and `torchrun` start them: each computes its part of every step.

All of them read the data and hold the whole model; the gradients are averaged by torch's DistributedDataParallel. The
first process alone writes files and speaks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel

from hub.unwinding import end_at_once

T = TypeVar("T")


def threads_here() -> int:
    """CPU threads for this process: all cores, shared with those started beside it."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class Processes:
    """Those of one run, seen from one of them."""

    count: int = 1
    number: int = 0  # this one's
    device: str = "cpu"  # of this one, as torch names it

    @classmethod
    def here(cls) -> Processes:
        """Join the others, where a launcher started several; waits until all have come."""
        cuda = torch.cuda.is_available()
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return cls(device="cuda" if cuda else "cpu")
        from accelerate import PartialState

        end_at_once(signal.SIGTERM, signal.SIGHUP)  # whoever waits for the others waits in C, where nothing is raised
        state = PartialState(cpu=not cuda)
        return cls(state.num_processes, state.process_index, str(state.device) if cuda else "cpu")

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.number == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def added(self, values: Sequence[float]) -> list[float]:
        """Each value's sum over the processes, the same bits in all of them."""
        if self.count == 1:
            return list(values)
        numbers = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(numbers)
        return [float(number) for number in numbers]


def as_forward(model: torch.nn.Module, compute: Callable[[], T]) -> T:
    """`compute()`, which runs modules of `model`, so that gradients are averaged where `model` is one process's of
    several: DistributedDataParallel averages those of its own forward alone, so `compute` takes the forward's place."""
    if not isinstance(model, DistributedDataParallel):
        return compute()
    inner = model.module
    own = inner.__dict__.get("forward")
    inner.forward = compute
    try:
        result: T = model()
    finally:
        del inner.forward
        if own is not None:
            inner.forward = own
    return result
