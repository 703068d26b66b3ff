"""Deterministic steps without native kernels: every token as if it were alone, in passes of one fixed shape.

What a GEMM returns for a row may change with the number of rows, because the library picks another kernel; so a
request's bits would depend on its company. Here nothing has a shape that depends on other requests:

- The model runs on exactly ROWS rows, always; a step of more tokens is several passes, a shorter one is padded. The
  output head runs on all of them or on none.
- Every token attends by itself over its own pages, whether it belongs to a prompt or to an answer, so that it does
  not matter either where a prompt was cut into chunks or which part of it was in the cache.
- An adapter's two GEMMs run over all ROWS rows, with what is not its own masked, one adapter after the other.
- What else an adapter multiplies by (`PartsHooks`, made with `singly`) takes one row at a time.

What is left to believe is that at a fixed shape a row's result depends neither on its place nor on the other rows.
No library promises that, so `check` tries it with the loaded model before anything is served.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from server.adapters.arena import BLOCK_ROWS
from server.adapters.linear import ActiveAdapters
from server.adapters.parts import PartsHooks
from server.engine.batch import slot
from server.engine.rows import ROWS, Row, StepOfRows, check_rows, part_spans, refuse_coupled, rows_of
from server.engine.scheduler import Share
from server.errors import DeterminismUnavailable
from server.kernels.cpu import LoraBlock
from server.model.attention import AttentionPlan
from server.model.base import BaseModel
from server.model.runner import PackedBatch, RunsPacked


class FixedRows:
    """Runs steps for one engine. Raises `DeterminismUnavailable` when made for a model it cannot promise for."""

    def __init__(
        self,
        base: BaseModel,
        runner: RunsPacked,
        active: ActiveAdapters,
        hooks: PartsHooks,
        page_tokens: int,
        max_rank: int,
    ) -> None:
        refuse_coupled(base)
        self._base = base
        self._runner = runner
        self._active = active
        self._hooks = hooks
        self._page_tokens = page_tokens
        self._max_rank = max_rank

    def run(self, shares: Seq[Share]) -> tuple[StepOfRows, Tensor]:
        """The step and its logits [S, vocabulary] in float32."""
        # Rows of the same adapters lie together, or each of them would need its own pass over the adapter.
        ordered = sorted(shares, key=lambda share: (share.tokens > 1, share.sequence.adapter_rows))
        rows = [row for share in ordered for row in rows_of(share)]
        logits = [self.forward(rows[start : start + ROWS]) for start in range(0, len(rows), ROWS)]
        return StepOfRows(tuple(ordered), tuple(share for share in ordered if share.samples)), torch.cat(logits)

    def forward(self, rows: Seq[Row]) -> Tensor:
        """One pass over at most ROWS rows; what the runner gives for those that sample, in order."""
        device = self._base.device
        padding = [0] * (ROWS - len(rows))
        wanted = [index for index, row in enumerate(rows) if row.samples]
        alone = [self._alone(row, device) for row in rows]
        self._active.use_blocks(adapter_blocks(rows, self._base.dtype, device))
        spans = part_spans(enumerate(rows))
        sampled = part_spans((index, rows[index]) for index in wanted)
        with self._hooks.applied(spans, sampled, (ROWS, ROWS if wanted else 0)):
            logits = self._runner.run(
                PackedBatch(
                    token_ids=torch.tensor([row.token_id for row in rows] + padding, device=device),
                    positions=torch.tensor([row.position for row in rows] + padding, device=device),
                    attention=_plan([slot(row.pages, row.position, self._page_tokens) for row in rows], alone, device),
                    sample_rows=torch.arange(ROWS if wanted else 0, device=device),
                )
            )
        return logits[wanted]

    def _alone(self, row: Row, device: str) -> AttentionPlan:
        """A plan of one decode, whose shapes come from the row's own position."""
        pages = torch.tensor(row.pages[: row.position // self._page_tokens + 1], device=device)
        length = torch.tensor([row.position + 1], device=device)
        return AttentionPlan(length[:0], 1, pages, length, row.position + 1, {}, ())

    def check(self) -> None:
        """See `check_rows`; the adapters' GEMMs too. Costs some forty passes."""
        check_rows(self.forward, self._base, self._runner, self._page_tokens)
        self._check_adapters(torch.Generator().manual_seed(0))

    def _check_adapters(self, generator: torch.Generator) -> None:
        """The same for the GEMMs of adapters, whose shapes the passes above do not have."""
        # Not the weights' own shape: a packed weight has another one.
        widths = {w for linear in self._base.linears().values() for w in (linear.in_features, linear.out_features)}
        for width in sorted(widths):
            for rank in range(BLOCK_ROWS, self._max_rank + 1, BLOCK_ROWS):
                for into, out in ((width, rank), (rank, width)):
                    weight = torch.randn(into, out, generator=generator).to(self._base.dtype)
                    company, one = (
                        torch.randn(count, into, generator=generator).to(self._base.dtype) for count in (ROWS, 1)
                    )
                    results = []
                    for place in range(ROWS):
                        x = company.roll(place, 0)
                        x[place] = one[0]
                        results.append((x @ weight)[place])
                    if not all(torch.equal(results[0], other) for other in results):
                        raise DeterminismUnavailable(
                            f"on this machine an adapter's product of {into} by {out} depends on its place in the "
                            "batch: --deterministic cannot be kept"
                        )


def adapter_blocks(rows: Seq[Row], dtype: torch.dtype, device: str) -> list[LoraBlock]:
    """A pair of GEMMs over all ROWS rows for every adapter of every distinct list of adapters, in its order."""
    blocks = []
    for adapter_rows in dict.fromkeys(row.adapter_rows for row in rows):
        for r0, r1, weight in adapter_rows:
            owner = torch.zeros(ROWS, 1, dtype=torch.bool, device=device)
            owner[[index for index, row in enumerate(rows) if row.adapter_rows == adapter_rows]] = True
            factor = None if weight == 1.0 else torch.full((1, 1), weight, dtype=dtype, device=device)
            blocks.append(LoraBlock(0, ROWS, r0, r1, owner, factor))
    return blocks


def _plan(write_slots: list[int], alone: list[AttentionPlan], device: str) -> AttentionPlan:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return AttentionPlan(torch.tensor(write_slots, device=device), 0, none, none, 0, {}, (), alone=alone)
