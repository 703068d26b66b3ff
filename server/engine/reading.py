"""Prompts that are only read: what the base itself makes of them, for a router to choose by.

They wait, are cut and preempted as any prompt, but their steps are their own: through the first layers alone, without
adapters, and without an output head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from server.adapters.first_layers import FirstLayers
from server.adapters.linear import ActiveAdapters
from server.engine.batch import lay_out
from server.engine.rows import ROWS, Row, rows_of
from server.engine.scheduler import Share
from server.model.longrope import LongRope


class Reader(Protocol):
    """Reads at one layer."""

    def run(self, shares: Seq[Share]) -> Iterator[tuple[Share, Tensor]]:
        """Each share, in any order, with the states [tokens, hidden] of its tokens in float32."""


class PackedReader:
    """All shares in one packed pass, as steps are elsewhere."""

    def __init__(
        self,
        layers: FirstLayers,
        active: ActiveAdapters,
        rope: LongRope | None,
        page_tokens: int,
        listed_tokens: int,
    ) -> None:
        self._layers = layers
        self._active = active
        self._rope = rope
        self._page_tokens = page_tokens
        self._listed_tokens = listed_tokens

    def run(self, shares: Seq[Share]) -> Iterator[tuple[Share, Tensor]]:
        """See `Reader`."""
        batch = lay_out(shares, self._page_tokens, "cpu", self._listed_tokens)
        self._active.use(batch.segments, batch.decodes)
        if self._rope is not None:
            self._rope.select(((s.tokens, len(s.sequence.tokens)) for s in batch.shares), "cpu")
        everything = torch.arange(batch.packed.token_ids.shape[0])
        states = self._layers.run(replace(batch.packed, sample_rows=everything))
        yield from zip(batch.shares, torch.split(states, [share.tokens for share in batch.shares]), strict=True)


class RowReader:
    """Every token as if it were alone, as `--deterministic` wants it: a choice does not depend on company either.

    forward: runs at most ROWS rows and gives the states of those that sample (`RowByRow`, `FixedRows`).
    """

    def __init__(self, forward: Callable[[Seq[Row]], Tensor]) -> None:
        self._forward = forward

    def run(self, shares: Seq[Share]) -> Iterator[tuple[Share, Tensor]]:
        """See `Reader`."""
        for share in shares:
            rows = [replace(row, samples=True) for row in rows_of(share)]
            passes = [self._forward(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]
            yield share, torch.cat(passes)
