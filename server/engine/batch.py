"""A step's shares laid out as one packed batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.parts import PartSpan
from server.engine.scheduler import Share
from server.model.attention import AttentionPlan, Span
from server.model.runner import PackedBatch


@dataclass(frozen=True)
class StepBatch:
    """What one step computes: the packed rows, which adapter rows apply to which tokens, and who samples."""

    packed: PackedBatch
    segments: tuple[tuple[int, int, int, int, float], ...]  # (t0, t1, r0, r1, weight)
    decodes: int
    shares: tuple[Share, ...]  # in row order
    sampling: tuple[Share, ...]  # in the order of packed.sample_rows


def lay_out(shares: Seq[Share], page_tokens: int, device: str) -> StepBatch:
    """One row a token: shares of one token first (they attend as decodes), then the longer ones.

    Within each part, rows of the same adapters lie together, so that each adapter is one segment.
    """
    ordered = sorted(shares, key=lambda s: (s.tokens > 1, s.sequence.adapter_rows))
    decodes = sum(share.tokens == 1 for share in ordered)
    token_ids: list[int] = []
    positions: list[int] = []
    write_slots: list[int] = []
    sample_rows: list[int] = []
    spans: list[Span] = []
    segments: list[tuple[int, int, int, int, float]] = []
    for share in ordered:
        sequence, t0 = share.sequence, len(token_ids)
        start, stop = sequence.computed, sequence.computed + share.tokens
        token_ids += sequence.tokens[start:stop]
        positions += range(start, stop)
        if share.tokens == 1:
            write_slots.append(slot(sequence.pages, start, page_tokens))
        else:
            slots = [slot(sequence.pages, position, page_tokens) for position in range(stop)]
            write_slots += slots[start:]
            spans.append(Span(t0, t0 + share.tokens, torch.tensor(slots, device=device)))
        if share.samples:
            sample_rows.append(len(token_ids) - 1)
        _extend(segments, t0, len(token_ids), sequence.adapter_rows)
    rows = ordered[:decodes]
    lengths = [share.sequence.computed + 1 for share in rows]
    packed = PackedBatch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        attention=AttentionPlan(
            write_slots=torch.tensor(write_slots, device=device),
            decodes=decodes,
            pages=_page_rows([share.sequence.pages for share in rows], lengths, page_tokens, device),
            lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
            longest=max(lengths, default=0),
            masks={},
            spans=spans,
        ),
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
    )
    return StepBatch(
        packed=packed,
        segments=tuple(segments),
        decodes=decodes,
        shares=tuple(ordered),
        sampling=tuple(share for share in ordered if share.samples),
    )


def part_spans(batch: StepBatch) -> tuple[list[PartSpan], list[PartSpan]]:
    """Where the batch's adapters have parts beside their rows: by token rows, and by sampled rows."""
    tokens: list[PartSpan] = []
    sampled: list[PartSpan] = []
    row = sample = 0
    for share in batch.shares:
        for parts, weight in share.sequence.parts:
            tokens.append(PartSpan(row, row + share.tokens, weight, parts))
            if share.samples:
                sampled.append(PartSpan(sample, sample + 1, weight, parts))
        row += share.tokens
        sample += share.samples
    return tokens, sampled


def slot(pages: Seq[int], position: int, page_tokens: int) -> int:
    """Where a sequence keeps the key and value of its token at `position`."""
    return pages[position // page_tokens] * page_tokens + position % page_tokens


def _extend(
    segments: list[tuple[int, int, int, int, float]],
    t0: int,
    t1: int,
    adapter_rows: Seq[tuple[int, int, float]],
) -> None:
    """Add the tokens t0…t1, joining them to the last segments where these hold the same adapters."""
    count = len(adapter_rows)
    tail = segments[-count:] if count else []
    if tail and [(t0, *rows) for rows in adapter_rows] == [(s[1], *s[2:]) for s in tail]:
        segments[-count:] = [(s[0], t1, *s[2:]) for s in tail]
    else:
        segments += [(t0, t1, *rows) for rows in adapter_rows]


def _page_rows(pages: Seq[Seq[int]], lengths: Seq[int], page_tokens: int, device: str) -> Tensor:
    """[rows * P] page numbers; a shorter row repeats its own first page, never a neighbour's."""
    counts = [-(-length // page_tokens) for length in lengths]
    widest = max(counts, default=0)
    padded = [[*own[:n], *[own[0]] * (widest - n)] for own, n in zip(pages, counts, strict=True)]
    return torch.tensor(padded, dtype=torch.int64, device=device).view(-1)
