"""Which examples share a batch: those of about the same length, so that next to nothing is spent on padding.

Packing several examples into one row would pad nothing at all, but without a kernel for it the attention of a packed
row is computed over everybody's tokens; grouped rows need no mask beyond the causal one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

# Batches sorted together. More pads less and makes the batches of an epoch less random.
_BATCHES_IN_POOL = 50


class LengthGroupedOrder(Sampler[int]):
    """Indices in an order that a batch sampler of size `batch` cuts into rows of about equal length.

    The order is a function of (seed, epoch) alone, so an interrupted epoch resumes with exactly the examples it had
    not yet seen.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths = tuple(lengths)
        self._batch = batch
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        shuffled = torch.randperm(len(self._lengths), generator=generator).tolist()
        pool = self._batch * _BATCHES_IN_POOL
        batches: list[list[int]] = []
        for start in range(0, len(shuffled), pool):
            pooled = sorted(shuffled[start : start + pool], key=lambda index: self._lengths[index])
            batches += [pooled[at : at + self._batch] for at in range(0, len(pooled), self._batch)]
        # A last batch that is not full must stay last, or everything behind it would be cut in other places.
        tail = [batches.pop()] if len(batches[-1]) < self._batch else []
        order = torch.randperm(len(batches), generator=generator).tolist()
        for batch in [*(batches[index] for index in order), *tail]:
            yield from batch
