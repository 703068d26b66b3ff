"""A step's shares laid out as one packed batch."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.parts import PartSpan
from server.engine.scheduler import Share
from server.kernels.native.decoder import ListedRows
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


# Prompts up to so many tokens attend row by row in the native kernel; for longer ones torch's blocks are faster.
LISTED_TOKENS = 512


def lay_out(shares: Seq[Share], page_tokens: int, device: str, listed_tokens: int = 0) -> StepBatch:
    """One row a token: shares of one token first (they attend as decodes), then the longer ones.

    Within each part, rows of the same adapters lie together, so that each adapter is one segment. `listed_tokens`:
    with native kernels, the length up to which a prompt's rows are listed singly; 0 where there are none.
    """
    ordered = sorted(shares, key=lambda s: (s.tokens > 1, s.sequence.adapter_rows))
    decodes = sum(share.tokens == 1 for share in ordered)
    token_ids: list[int] = []
    positions: list[int] = []
    write_slots: list[int] = []
    sample_rows: list[int] = []
    spans: list[Span] = []
    segments: list[tuple[int, int, int, int, float]] = []
    listing = Listing(page_tokens)
    for share in ordered:
        sequence, t0 = share.sequence, len(token_ids)
        start, stop = sequence.computed, sequence.computed + share.tokens
        token_ids += sequence.tokens[start:stop]
        positions += range(start, stop)
        lists = listed_tokens > 0 and (share.tokens == 1 or stop <= listed_tokens)
        if lists:
            listing.add(t0, start, stop, sequence.pages)
        if share.tokens == 1 or lists:
            write_slots += [slot(sequence.pages, position, page_tokens) for position in range(start, stop)]
        else:
            slots = [slot(sequence.pages, position, page_tokens) for position in range(stop)]
            write_slots += slots[start:]
            spans.append(Span(t0, t0 + share.tokens, torch.tensor(slots, device=device)))
        if share.samples:
            sample_rows.append(len(token_ids) - 1)
        extend_segments(segments, t0, len(token_ids), sequence.adapter_rows)
    rows = ordered[:decodes] if listed_tokens == 0 else []
    lengths = [share.sequence.computed + 1 for share in rows]
    packed = PackedBatch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        attention=AttentionPlan(
            write_slots=torch.tensor(write_slots, device=device),
            decodes=len(rows),
            pages=_page_rows([share.sequence.pages for share in rows], lengths, page_tokens, device),
            lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
            longest=max(lengths, default=0),
            masks={},
            spans=spans,
            listed=listing.tensors() if listed_tokens else None,
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


class Listing:
    """Gathers `ListedRows`."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._rows: list[int] = []
        self._sequences: list[int] = []
        self._lengths: list[int] = []
        self._pages: list[Seq[int]] = []

    def add(self, t0: int, start: int, stop: int, pages: Seq[int]) -> None:
        """Rows from t0 on are the tokens start…stop of a sequence with these pages."""
        self._rows += range(t0, t0 + stop - start)
        self._sequences += [len(self._pages)] * (stop - start)
        self._lengths += range(start + 1, stop + 1)
        self._pages.append(pages[: -(-stop // self._page_tokens)])

    def tensors(self) -> ListedRows:
        """What was gathered."""
        widest = max(map(len, self._pages), default=0)
        # A shorter row repeats its own first page, never a neighbour's.
        padded = [[*own, *[own[0]] * (widest - len(own))] for own in self._pages]
        return ListedRows(
            rows=torch.tensor(self._rows, dtype=torch.int64),
            sequences=torch.tensor(self._sequences, dtype=torch.int64),
            lengths=torch.tensor(self._lengths, dtype=torch.int64),
            pages=torch.tensor(padded, dtype=torch.int64).view(len(padded), widest),
            longest=max(self._lengths, default=0),
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


def extend_segments(
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
