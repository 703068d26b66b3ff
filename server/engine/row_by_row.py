"""Deterministic steps on the native kernels: every token is computed as if it were alone, all in one pass.

The kernels sum every output in one order, whatever shares the call, so nothing needs a fixed shape. What is left to see
to is that a token takes the same way through them whether it belongs to a prompt or to an answer, wherever a prompt was
cut and whichever part of it was in the cache: each attends by itself, and adds its adapters up by itself.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.adapters.linear import ActiveAdapters
from server.engine.batch import Listing, slot
from server.engine.rows import Row, StepOfRows, check_rows, refuse_coupled, rows_of
from server.engine.scheduler import Share
from server.model.attention import AttentionPlan
from server.model.base import BaseModel
from server.model.runner import PackedBatch, Runner


class RowByRow:
    """Runs steps for one engine whose layers are fused.

    Raises `DeterminismUnavailable` when made for a model it cannot promise for.
    """

    def __init__(self, base: BaseModel, runner: Runner, active: ActiveAdapters, page_tokens: int) -> None:
        refuse_coupled(base)
        self._base = base
        self._runner = runner
        self._active = active
        self._page_tokens = page_tokens

    def run(self, shares: Seq[Share]) -> tuple[StepOfRows, Tensor]:
        """The step and its logits [S, vocabulary] in float32."""
        # Rows of the same adapters lie together: what they share is in the cache then.
        ordered = sorted(shares, key=lambda share: share.sequence.adapter_rows)
        logits = self.forward([row for share in ordered for row in rows_of(share)])
        return StepOfRows(tuple(ordered), tuple(share for share in ordered if share.samples)), logits

    def forward(self, rows: Seq[Row]) -> Tensor:
        """One pass; the logits of the rows that sample, in order."""
        listing = Listing(self._page_tokens)
        for index, row in enumerate(rows):
            listing.add(index, row.position, row.position + 1, row.pages)
        segments = tuple((t, t + 1, *adapter) for t, row in enumerate(rows) for adapter in row.adapter_rows)
        self._active.use(segments, len(rows))
        none = torch.zeros(0, dtype=torch.int64)
        write_slots = torch.tensor([slot(row.pages, row.position, self._page_tokens) for row in rows])
        return self._runner.run(
            PackedBatch(
                token_ids=torch.tensor([row.token_id for row in rows]),
                positions=torch.tensor([row.position for row in rows]),
                attention=AttentionPlan(write_slots, 0, none, none, 0, {}, (), listing.tensors()),
                sample_rows=torch.tensor([t for t, row in enumerate(rows) if row.samples], dtype=torch.int64),
            )
        )

    def check(self) -> None:
        """See `check_rows`."""
        check_rows(self.forward, self._base, self._runner, self._page_tokens)
