"""Device memory for adapters: one matrix pair per linear layer, an adapter owns as many rows as its rank.

Ranks mix without padding to the largest; several adapters on one token are several row ranges; and there is no
slot number that could name somebody else's adapter by mistake.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.weights import LoraWeights
from server.kernels.native.loading import copy_all

BLOCK_ROWS = 8


@dataclass(frozen=True, order=True)
class Rows:
    """A range of arena rows, whole blocks; `rank` of them are in use, the rest are zero."""

    start: int
    stop: int


class Arena:
    """Rows for all adapters on the device.

    `a[site]`: [rows, in] and `b[site]`: [rows, out]. Not thread-safe in its bookkeeping: `Residency` calls
    `allocate` and `free` under its lock. `write` touches only the rows given, so it may run beside a forward pass
    that uses other rows.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], rows: int, dtype: torch.dtype, device: str) -> None:
        self.rows = rows - rows % BLOCK_ROWS
        self.row_bytes = row_bytes(shapes, dtype)
        self.device = device
        self.a: dict[str, Tensor] = {}
        self.b: dict[str, Tensor] = {}
        for site, (out_features, in_features) in shapes.items():
            self.a[site] = torch.zeros(self.rows, in_features, dtype=dtype, device=device)
            self.b[site] = torch.zeros(self.rows, out_features, dtype=dtype, device=device)
        # Where each matrix begins and a row's bytes: asking torch takes longer than the copying.
        self._places = {
            site: tuple((m.data_ptr(), m.shape[1] * m.itemsize) for m in (self.a[site], self.b[site]))
            for site in shapes
        }
        self._free = [Rows(0, self.rows)] if self.rows else []

    def allocate(self, rank: int) -> Rows | None:
        """The first free range of `rank` rows rounded up to whole blocks, or None."""
        wanted = blocks(rank)
        for i, gap in enumerate(self._free):
            if gap.stop - gap.start >= wanted:
                taken = Rows(gap.start, gap.start + wanted)
                rest = Rows(taken.stop, gap.stop)
                self._free[i : i + 1] = [rest] if rest.stop > rest.start else []
                return taken
        return None

    def free(self, rows: Rows) -> None:
        """Give rows back."""
        joined: list[Rows] = []
        for gap in sorted([*self._free, rows]):
            if joined and joined[-1].stop > gap.start:
                raise AssertionError(f"rows {gap} were freed twice")
            if joined and joined[-1].stop == gap.start:
                joined[-1] = Rows(joined[-1].start, gap.stop)
            else:
                joined.append(gap)
        self._free = joined

    @torch.inference_mode()
    def write(self, rows: Rows, weights: LoraWeights) -> None:
        """Copy an adapter into its rows; sites and rows it does not use become zero."""
        if self.device == "cpu" and copy_all(self._copies(rows, weights)):
            return
        for site, a in self.a.items():
            b = self.b[site]
            update = weights.sites.get(site)
            rank = 0
            if update is not None:
                rank = update.a.shape[0]
                a[rows.start : rows.start + rank].copy_(update.a)
                b[rows.start : rows.start + rank].copy_(update.b)
            a[rows.start + rank : rows.stop].zero_()
            b[rows.start + rank : rows.stop].zero_()

    def _copies(self, rows: Rows, weights: LoraWeights) -> Iterator[tuple[int, int, int]]:
        """(from, to, bytes), `from` 0 for zeros; one interpreter lock for all of them."""
        for site, places in self._places.items():
            update = weights.sites.get(site)
            sources = (None, None) if update is None else (update.a, update.b)
            for (to, row), source in zip(places, sources, strict=True):
                rank = 0
                if source is not None:
                    rank = source.shape[0]
                    yield source.data_ptr(), to + rows.start * row, rank * row
                if rows.start + rank < rows.stop:
                    yield 0, to + (rows.start + rank) * row, (rows.stop - rows.start - rank) * row

    def aside(self) -> AbstractContextManager[None]:
        """Entered around `write` and what belongs to it; when it is left, the device has done it."""
        return nullcontext()

    def free_rows(self) -> int:
        """Rows not in use."""
        return sum(gap.stop - gap.start for gap in self._free)

    def check_integrity(self, owned: Mapping[str, Rows]) -> None:
        """Raise AssertionError unless `owned` and the free list cover every row exactly once."""
        at = 0
        for rows in sorted([*self._free, *owned.values()]):
            if rows.start != at:
                raise AssertionError(f"arena rows {at}…{rows.start} are lost or owned twice")
            at = rows.stop
        if at != self.rows:
            raise AssertionError(f"arena rows from {at} on are lost")


def blocks(rank: int) -> int:
    """Rows that an adapter of this rank takes."""
    return -(-rank // BLOCK_ROWS) * BLOCK_ROWS


def row_bytes(shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> int:
    """Device bytes of one row over all sites."""
    return sum(out_features + in_features for out_features, in_features in shapes.values()) * dtype.itemsize
