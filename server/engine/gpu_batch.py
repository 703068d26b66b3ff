"""A step's shares laid out as one packed batch for a GPU: all its integers cross the bus in one copy."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import chain

import torch
from torch import Tensor

from server.engine.batch import StepBatch, extend_segments, slot
from server.engine.scheduler import Share
from server.kernels.gpu.attention import DecodeScratch
from server.kernels.gpu.prompts import PrefillPlan, tiles
from server.model.attention import AttentionPlan
from server.model.gpu_attention import GpuAttention
from server.model.runner import PackedBatch


def lay_out(shares: Seq[Share], page_tokens: int, device: str, heads: int, width: int) -> StepBatch:
    """As `batch.lay_out`: one row a token, shares of one token first; `heads` query heads of `width`."""
    ordered = sorted(shares, key=lambda share: (share.tokens > 1, share.sequence.adapter_rows))
    decodes = [share for share in ordered if share.tokens == 1]
    prompts = ordered[len(decodes) :]
    token_ids: list[int] = []
    positions: list[int] = []
    write_slots: list[int] = []
    sample_rows: list[int] = []
    segments: list[tuple[int, int, int, int, float]] = []
    spans: list[tuple[int, int, int]] = []  # (first row, one past the last, tokens of the sequence so far)
    for share in ordered:
        sequence, t0 = share.sequence, len(token_ids)
        start, stop = sequence.computed, sequence.computed + share.tokens
        token_ids += sequence.tokens[start:stop]
        positions += range(start, stop)
        write_slots += [slot(sequence.pages, position, page_tokens) for position in range(start, stop)]
        if share.tokens > 1:
            spans.append((t0, len(token_ids), stop))
        if share.samples:
            sample_rows.append(len(token_ids) - 1)
        extend_segments(segments, t0, len(token_ids), sequence.adapter_rows)
    lengths = [share.sequence.computed + 1 for share in decodes]
    answer_pages, prompt_pages = (
        _rows([share.sequence.pages[: -(-(share.sequence.computed + share.tokens) // page_tokens)] for share in part])
        for part in (decodes, prompts)
    )
    parts = [token_ids, positions, write_slots, sample_rows, lengths, answer_pages, tiles(spans), prompt_pages]
    ids, at, slots, sampled, known, answers, cut, asked = _sent(parts, device)
    longest = max(lengths, default=0)
    attention = GpuAttention(
        decodes=len(decodes),
        pages=answers.view(len(decodes), -1) if decodes else answers.view(0, 0),
        lengths=known,
        scratch=DecodeScratch(len(decodes), heads, width, rounded(longest), device) if decodes else None,
        prompts=PrefillPlan(cut.view(-1, 4), asked.view(len(prompts), -1)) if prompts else None,
    )
    none = ids[:0]
    return StepBatch(
        packed=PackedBatch(
            token_ids=ids.long(),
            positions=at.long(),
            attention=AttentionPlan(slots.long(), 0, none, none, 0, {}, (), gpu=attention),
            sample_rows=sampled.long(),
        ),
        segments=tuple(segments),
        decodes=len(decodes),
        shares=tuple(ordered),
        sampling=tuple(share for share in ordered if share.samples),
    )


def rounded(longest: int) -> int:
    """Up to a power of two from 1,024 on: the kernel is compiled for the room it is given."""
    return max(1024, 1 << (longest - 1).bit_length())


def _rows(pages: Seq[Seq[int]]) -> list[int]:
    """[sequences * P]: what is past a sequence's end is not read."""
    widest = max(map(len, pages), default=0)
    return list(chain.from_iterable([*own, *[0] * (widest - len(own))] for own in pages))


def _sent(parts: Seq[Seq[int]], device: str) -> list[Tensor]:
    """Each part as int32 on the device: slices of one tensor, copied once, each 16-byte aligned."""
    padded = [[*part, *[0] * (-len(part) % 4)] for part in parts]
    host = torch.tensor(list(chain.from_iterable(padded)), dtype=torch.int32)
    if device.startswith("cuda"):
        host = host.pin_memory()
    whole = host.to(device, non_blocking=True)
    sent, at = [], 0
    for part, own in zip(parts, padded, strict=True):
        sent.append(whole[at : at + len(part)])
        at += len(own)
    return sent
