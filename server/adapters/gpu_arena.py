"""The arena on a GPU: adapters come in large copies beside the running steps, and are known when they have arrived."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate

import torch
from torch import Tensor

from server.adapters.arena import Arena, Rows
from server.adapters.pinned import Chunk, PinnedWeights
from server.adapters.weights import LoraWeights
from server.kernels.gpu.aside import Aside
from server.kernels.gpu.scatter import scatter

STAGED_BYTES = 128 << 20  # of device memory, for what has arrived and is not yet in its rows


class GpuArena(Arena):
    """Rows for all adapters; `write` takes what `pin` made. Called by one thread, inside `aside`."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], rows: int, dtype: torch.dtype, device: str, aside: Aside
    ) -> None:
        super().__init__(shapes, rows, dtype, device)
        self._aside = aside
        self._staging = torch.empty(0, dtype=dtype, device=device)

    def aside(self) -> AbstractContextManager[None]:
        """See `Arena.aside`: on a stream of its own, waited for when it is left."""
        return self._aside()

    @torch.inference_mode()
    def write(self, rows: Rows, weights: LoraWeights) -> None:
        """Copy an adapter into its rows; sites and rows it does not use become zero."""
        if not isinstance(weights, PinnedWeights):
            raise AssertionError("an adapter for a GPU was not pinned")
        for chunks in _batches(weights.chunks):
            self._bring(chunks, rows)
        self._scatter(None, self._unused(rows, weights))

    def _bring(self, chunks: list[Chunk], rows: Rows) -> None:
        """The copies begin before anything is computed for where they go: Python's lock may be long in coming."""
        starts = list(accumulate((chunk.image.numel() for chunk in chunks), initial=0))
        if self._staging.numel() < starts[-1]:
            self._staging = torch.empty(starts[-1], dtype=self._staging.dtype, device=self._staging.device)
        for start, chunk in zip(starts, chunks, strict=False):
            # In stream order: they arrive when those before have been moved on.
            self._staging[start : start + chunk.image.numel()].copy_(chunk.image, non_blocking=True)
        pieces: list[int] = []
        size = self._staging.itemsize
        for start, chunk in zip(starts, chunks, strict=False):
            for half in chunk.halves:
                address, row = self._places[half.site][half.b]
                pieces += (address + rows.start * row, start + half.start, half.rows * (row // size))
        self._scatter(self._staging, pieces)

    def _unused(self, rows: Rows, weights: LoraWeights) -> list[int]:
        pieces: list[int] = []
        size, whole = self._staging.itemsize, rows.stop - rows.start
        for site, places in self._places.items():
            pair = weights.sites.get(site)
            used = 0 if pair is None else pair.a.shape[0]
            if used < whole:
                for address, row in places:
                    pieces += (address + (rows.start + used) * row, 0, (whole - used) * (row // size))
        return pieces

    def _scatter(self, source: Tensor | None, pieces: list[int]) -> None:
        """pieces: address, first element of the source, elements, and so on, as `scatter` takes them."""
        if not pieces:
            return
        table = torch.tensor(pieces, dtype=torch.int64).view(-1, 3)
        known = table.numpy()
        aligned = not bool((known[:, 0] % 16).any() or (known[:, 1:] % 8).any())
        longest = int(known[:, 2].max())
        if self._staging.is_cuda:
            table = table.pin_memory()
        sent = table.to(self._staging.device, non_blocking=True)
        scatter(source, self._staging, sent, longest, aligned=aligned)


def _batches(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Of chunks that are on the device together, in stretches of up to `STAGED_BYTES`."""
    batch: list[Chunk] = []
    for chunk in chunks:
        if batch and sum(c.image.nbytes for c in batch) + chunk.image.nbytes > STAGED_BYTES:
            yield batch
            batch = []
        batch.append(chunk)
    if batch:
        yield batch
