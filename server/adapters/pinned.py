"""An adapter in host memory as it crosses the bus to a GPU: a few page-locked chunks, each copied whole.

torch rounds page-locked memory up to powers of two, so a chunk takes the largest power of two that is left: an adapter
of 80 MiB lies in 64 and 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.rank_rows import SiteWeights
from server.adapters.weights import LoraWeights

CHUNK_BYTES = 64 << 20
_LEAST_CHUNK = 4 << 20  # what is left is one chunk from here down


@dataclass(frozen=True)
class Half:
    """One matrix of an adapter within a chunk."""

    site: str
    b: bool  # else a
    start: int  # element of the chunk
    rows: int


@dataclass(frozen=True)
class Chunk:
    """Matrices one after the other."""

    image: Tensor  # [elements], page-locked where there is a GPU
    halves: tuple[Half, ...]


@dataclass(frozen=True)
class PinnedWeights(LoraWeights):
    """A parsed adapter whose matrices are views into its chunks."""

    chunks: tuple[Chunk, ...] = ()


def pin(weights: LoraWeights, *, page_locked: bool, chunk_bytes: int = CHUNK_BYTES) -> PinnedWeights:
    """Copy an adapter's matrices into chunks of up to `chunk_bytes` (a larger matrix has one of its own)."""
    chunks: list[Chunk] = []
    views: dict[tuple[str, bool], Tensor] = {}
    for group in _groups(weights, chunk_bytes):
        image = torch.empty(sum(t.numel() for *_, t in group), dtype=group[0][2].dtype, pin_memory=page_locked)
        halves, at = [], 0
        for site, b, matrix in group:
            view = image[at : at + matrix.numel()].view(matrix.shape)
            view.copy_(matrix)
            views[site, b] = view
            halves.append(Half(site, b, at, matrix.shape[0]))
            at += matrix.numel()
        chunks.append(Chunk(image, tuple(halves)))
    sites = {site: SiteWeights(views[site, False], views[site, True]) for site in weights.sites}
    return PinnedWeights(
        weights.digest, weights.rank, sites, weights.warnings, weights.parts, weights.reaches_kv, tuple(chunks)
    )


def _groups(weights: LoraWeights, chunk_bytes: int) -> Iterator[list[tuple[str, bool, Tensor]]]:
    group: list[tuple[str, bool, Tensor]] = []
    left = sum(m.nbytes for pair in weights.sites.values() for m in (pair.a, pair.b))
    held, room = 0, _room(left, chunk_bytes)
    for site, pair in weights.sites.items():
        for b, matrix in ((False, pair.a), (True, pair.b)):
            if group and held + matrix.nbytes > room:
                yield group
                left -= held
                group, held, room = [], 0, _room(left, chunk_bytes)
            group.append((site, b, matrix))
            held += matrix.nbytes
    if group:
        yield group


def _room(left: int, most: int) -> int:
    return min(most, left if left <= _LEAST_CHUNK else 1 << (left.bit_length() - 1))
