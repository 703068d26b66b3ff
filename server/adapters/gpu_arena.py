"""The arena on a GPU: adapters come in large copies beside the running steps, and are known when they have arrived."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from server.adapters.arena import Arena, Rows
from server.adapters.pinned import Chunk, PinnedWeights
from server.adapters.weights import LoraWeights
from server.kernels.gpu.aside import Aside
from server.kernels.gpu.scatter import scatter

Piece = tuple[int, int, int]
"""(address, first element of the source, elements), as `scatter` takes them."""


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
        largest = max((chunk.image.numel() for chunk in weights.chunks), default=1)
        if self._staging.numel() < largest:
            self._staging = torch.empty(largest, dtype=self._staging.dtype, device=self._staging.device)
        for chunk in weights.chunks:
            # In stream order: a chunk arrives when the one before has been moved on.
            self._staging[: chunk.image.numel()].copy_(chunk.image, non_blocking=True)
            self._move(self._staging, self._pieces(chunk, rows))
        self._move(None, self._zeros(rows, weights))

    def _move(self, source: Tensor | None, pieces: list[Piece]) -> None:
        if pieces:
            table = torch.tensor(pieces, dtype=torch.int64)
            if self._staging.is_cuda:
                table = table.pin_memory()
            aligned = all(address % 16 == start % 8 == count % 8 == 0 for address, start, count in pieces)
            longest = max(count for *_, count in pieces)
            sent = table.to(self._staging.device, non_blocking=True)
            scatter(source, self._staging, sent, longest, aligned=aligned)

    def _pieces(self, chunk: Chunk, rows: Rows) -> list[Piece]:
        pieces = []
        for half in chunk.halves:
            matrix = (self.b if half.b else self.a)[half.site]
            address = matrix.data_ptr() + rows.start * matrix.shape[1] * matrix.itemsize
            pieces.append((address, half.start, half.rows * matrix.shape[1]))
        return pieces

    def _zeros(self, rows: Rows, weights: LoraWeights) -> list[Piece]:
        pieces = []
        for site, a in self.a.items():
            used = weights.sites[site].a.shape[0] if site in weights.sites else 0
            for matrix in (a, self.b[site]):
                unused = rows.stop - rows.start - used
                if unused:
                    address = matrix.data_ptr() + (rows.start + used) * matrix.shape[1] * matrix.itemsize
                    pieces.append((address, 0, unused * matrix.shape[1]))
        return pieces
