"""Deterministic steps on the native kernels: every token is computed as if it were alone, all in one pass.

The kernels sum every output in one order, whatever shares the call, so nothing needs a fixed shape. What is left to see
to is that a token takes the same way through them whether it belongs to a prompt or to an answer, wherever a prompt was
cut and whichever part of it was in the cache: each attends by itself, and adds its adapters up by itself.

Tokens whose adapter replaces a module within the layers cannot take that way: torch computes part of theirs, whose
results may depend on the number of rows. Each of them has a pass of its own, whatever else the step computes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.adapters.linear import ActiveAdapters
from server.adapters.parts import PartsHooks
from server.engine.batch import Listing, slot
from server.engine.rows import Row, StepOfRows, check_rows, part_spans, refuse_coupled, rows_of
from server.engine.scheduler import Share
from server.model.attention import AttentionPlan
from server.model.base import BaseModel
from server.model.runner import PackedBatch, RunsPacked


class RowByRow:
    """Runs steps for one engine whose layers are fused.

    Raises `DeterminismUnavailable` when made for a model it cannot promise for.
    """

    def __init__(
        self, base: BaseModel, runner: RunsPacked, active: ActiveAdapters, hooks: PartsHooks, page_tokens: int
    ) -> None:
        refuse_coupled(base)
        self._base = base
        self._runner = runner
        self._active = active
        self._hooks = hooks
        self._page_tokens = page_tokens

    def run(self, shares: Seq[Share]) -> tuple[StepOfRows, Tensor]:
        """The step and its logits [S, vocabulary] in float32."""
        # Rows of the same adapters lie together: what they share is in the cache then.
        inside = {share.sequence: self._hooks.inside(parts for parts, _ in share.sequence.parts) for share in shares}
        ordered = sorted(shares, key=lambda share: (inside[share.sequence], share.sequence.adapter_rows))
        together = [row for share in ordered if not inside[share.sequence] for row in rows_of(share)]
        logits = [self.forward(together)] if together else []
        logits += [self.forward([row], False) for share in ordered if inside[share.sequence] for row in rows_of(share)]
        return StepOfRows(tuple(ordered), tuple(share for share in ordered if share.samples)), torch.cat(logits)

    def forward(self, rows: Seq[Row], plain: bool = True) -> Tensor:
        """One pass, by the layers' single modules unless `plain`; what the runner gives for those rows that sample."""
        listing = Listing(self._page_tokens)
        for index, row in enumerate(rows):
            listing.add(index, row.position, row.position + 1, row.pages)
        segments = tuple((t, t + 1, *adapter) for t, row in enumerate(rows) for adapter in row.adapter_rows)
        spans = part_spans(enumerate(rows))
        sampling = [t for t, row in enumerate(rows) if row.samples]
        sampled = part_spans(enumerate(rows[t] for t in sampling))
        self._active.use(segments, len(rows), plain, self._hooks.native_plan(spans) if plain else None)
        none = torch.zeros(0, dtype=torch.int64)
        write_slots = torch.tensor([slot(row.pages, row.position, self._page_tokens) for row in rows])
        batch = PackedBatch(
            token_ids=torch.tensor([row.token_id for row in rows]),
            positions=torch.tensor([row.position for row in rows]),
            attention=AttentionPlan(write_slots, 0, none, none, 0, {}, (), listing.tensors()),
            sample_rows=torch.tensor(sampling, dtype=torch.int64),
        )
        try:
            with self._hooks.applied(spans, sampled, (len(rows), len(sampling))):
                return self._runner.run(batch)
        finally:
            self._active.affine = None

    def check(self) -> None:
        """See `check_rows`."""
        check_rows(self.forward, self._base, self._runner, self._page_tokens)
