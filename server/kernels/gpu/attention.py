"""Attention over paged keys and values: one new token a sequence (decode), or a stretch of a prompt (prefill).

The meaning is `reference.paged_attention`. Position p of a sequence lies in slot page[p / page_tokens] * page_tokens +
p % page_tokens. Only slots of positions that a token sees are read: whatever else a page holds, NaN included, has no
part in the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gpu.launch import multiply, power_of_two, precision

CHUNK = 256  # positions a program of the decode sees at most; longer contexts are split and combined
_STEP = 64  # positions in one tile
_ROWS = 64  # prompt tokens in one tile


class DecodeScratch:
    """What the programs of one decode leave to be combined; serves all layers in turn. `longest`: of any context."""

    def __init__(self, rows: int, heads: int, width: int, longest: int, device: torch.device | str) -> None:
        self.splits = -(-longest // CHUNK)
        padded = power_of_two(width)
        self.sums = torch.empty(rows, heads, self.splits, padded, dtype=torch.float32, device=device)
        self.states = torch.empty(rows, heads, self.splits, 2, dtype=torch.float32, device=device)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scratch: DecodeScratch,
    *,
    page_tokens: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """One new token a sequence; returns [rows, Hq, D].

    q: [rows, Hq, D], rows may be strided; k, v: [Hkv, slots, D]; pages: [rows, P] int32, entries past a sequence's
    end are not read; lengths: [rows] int32, the new token included, at most what `scratch` was made for. A length of
    0 marks a row of padding: it reads nothing and its answer is 0.

    The grid follows the room in `scratch`, not the lengths, and the cuts between programs depend on a sequence's own
    length alone: a captured graph fits later steps, and company changes no answer.
    """
    rows, heads, width = q.shape
    kv_heads, slots, _ = k.shape
    if scratch.sums.shape[0] < rows or scratch.sums.shape[1] != heads or scratch.sums.shape[3] != power_of_two(width):
        raise ValueError(f"scratch of {tuple(scratch.sums.shape)} for queries of {tuple(q.shape)}")
    if q.stride(2) != 1 or q.stride(1) != width or not k.is_contiguous() or not v.is_contiguous():
        raise ValueError("a token's query heads lie side by side, keys and values are contiguous")
    # With a window, positions are counted from where it begins, so no more chunks than it holds are needed.
    splits = scratch.splits if window is None else min(scratch.splits, -(-window // CHUNK))
    out = torch.empty(rows, heads, width, dtype=q.dtype, device=q.device)
    _decode[(rows, kv_heads, splits)](
        q,
        k,
        v,
        pages,
        lengths,
        out,
        scratch.sums,
        scratch.states,
        q.stride(0),
        slots,
        pages.stride(0),
        scratch.splits,
        scale,
        softcap or 0.0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=power_of_two(heads // kv_heads),
        WIDTH=width,
        PADDED=power_of_two(width),
        PAGE=page_tokens,
        CHUNK=CHUNK,
        STEP=_STEP,
        SPLITS=splits,
        WINDOW=window or 0,
        SOFTCAP=softcap is not None,
        PRECISION=precision(q),
        num_warps=4,
        num_stages=3,
    )
    if splits > 1:
        _combine[(rows, heads)](
            lengths,
            out,
            scratch.sums,
            scratch.states,
            scratch.splits,
            HEADS=heads,
            WIDTH=width,
            PADDED=power_of_two(width),
            CHUNK=CHUNK,
            SPLITS=splits,
            WINDOW=window or 0,
            num_warps=2,
        )
    return out


@dataclass(frozen=True)
class PrefillPlan:
    """Stretches of prompts, cut into tiles.

    tiles: [tiles, 4] int32: (stretch, first row of the batch, one past the stretch's last row, position of the first
    row). pages: [stretches, P] int32.
    """

    tiles: Tensor
    pages: Tensor

    @staticmethod
    def make(
        spans: Sequence[tuple[int, int, int]], pages: Sequence[Sequence[int]], device: torch.device | str
    ) -> PrefillPlan:
        """spans: (t0, t1, length): rows t0…t1 are the last of a sequence of `length` tokens, which lie in `pages`."""
        widest = max((len(own) for own in pages), default=0)
        rows = [[*own, *[0] * (widest - len(own))] for own in pages]
        return PrefillPlan(
            torch.tensor(tiles(spans), dtype=torch.int32).view(-1, 4).to(device, non_blocking=True),
            torch.tensor(rows, dtype=torch.int32).view(len(rows), widest).to(device, non_blocking=True),
        )


def tiles(spans: Sequence[tuple[int, int, int]]) -> list[int]:
    """The rows of `PrefillPlan.tiles`, one after the other. spans: (t0, t1, length): rows t0…t1 are the last of a
    sequence of `length` tokens."""
    cut: list[int] = []
    for number, (t0, t1, length) in enumerate(spans):
        if not 0 <= t1 - t0 <= length:
            raise ValueError(f"{t1 - t0} rows of a sequence of {length}")
        for t in range(t0, t1, _ROWS):
            cut += (number, t, t1, length - (t1 - t))
    return cut


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PrefillPlan,
    out: Tensor,
    *,
    page_tokens: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """Causal attention of the plan's rows, written into `out` at the same rows; other rows are left alone.

    q, out: [T, Hq, D], heads of a token side by side; k, v: [Hkv, slots, D], the new tokens' own already stored.
    """
    _, heads, width = q.shape
    kv_heads, slots, _ = k.shape
    if plan.tiles.shape[0] == 0:
        return
    if q.stride(2) != 1 or q.stride(1) != width or out.stride(2) != 1 or out.stride(1) != width:
        raise ValueError("a token's heads lie side by side")
    _prefill[(plan.tiles.shape[0], heads)](
        q,
        k,
        v,
        plan.tiles,
        plan.pages,
        out,
        q.stride(0),
        out.stride(0),
        slots,
        plan.pages.shape[1],
        scale,
        softcap or 0.0,
        GROUP=heads // kv_heads,
        WIDTH=width,
        PADDED=power_of_two(width),
        PAGE=page_tokens,
        ROWS=_ROWS,
        STEP=_STEP,
        WINDOW=window or 0,
        SOFTCAP=softcap is not None,
        PRECISION=precision(q),
        num_warps=4,
        num_stages=3,
    )


@triton.jit
def _scores(q_tile, k_tile, scale, softcap, seen, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores in units of log2(e), so that exp2 serves; unseen ones are -inf."""
    zero = tl.zeros([q_tile.shape[0], k_tile.shape[1]], dtype=tl.float32)
    scores = multiply(q_tile, k_tile, zero, PRECISION) * scale
    if SOFTCAP:
        # tanh by way of exp; beyond its limits exp overflows to infinity and the quotient to the right sign.
        scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
    return tl.where(seen, scores * 1.4426950408889634, float("-inf"))


@triton.jit
def _slots(pages, position, seen, PAGE: tl.constexpr):
    """Cache slots of positions, 0 for those not seen (their rows are not read)."""
    page = tl.load(pages + position // PAGE, mask=seen, other=0)
    return page.to(tl.int64) * PAGE + position % PAGE


@triton.jit
def _step(top, total, sums, scores, v_tile, PRECISION: tl.constexpr):
    """One tile more of a running softmax; a row that has seen nothing yet stays at -inf, 0, 0."""
    new = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(weights, 1)
    sums = multiply(weights.to(v_tile.dtype), v_tile, sums * fade[:, None], PRECISION)
    return new, total, sums


@triton.jit
def _decode(
    q,
    k,
    v,
    pages,
    lengths,
    out,
    sums_out,
    states,
    q_stride,
    slots,
    page_stride,
    split_stride,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A chunk of one sequence's positions for the query heads of one key head."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    EACH: tl.constexpr = HEADS // KV_HEADS
    length = tl.load(lengths + row)
    start = 0
    if WINDOW > 0:
        start = tl.maximum(length - WINDOW, 0)
    first = start + split * CHUNK
    last = tl.minimum(first + CHUNK, length)
    if first < last or split == 0:
        g = tl.arange(0, GROUP)
        d = tl.arange(0, PADDED)
        head = kv_head * EACH + g
        own = (g < EACH)[:, None] & (d < WIDTH)[None, :]
        q_tile = tl.load(q + row.to(tl.int64) * q_stride + head[:, None] * WIDTH + d[None, :], mask=own, other=0.0)
        k_head = k + kv_head.to(tl.int64) * slots * WIDTH
        v_head = v + kv_head.to(tl.int64) * slots * WIDTH
        own_pages = pages + row.to(tl.int64) * page_stride
        top = tl.full([GROUP], float("-inf"), dtype=tl.float32)
        total = tl.zeros([GROUP], dtype=tl.float32)
        sums = tl.zeros([GROUP, PADDED], dtype=tl.float32)
        for at in range(first, last, STEP):
            position = at + tl.arange(0, STEP)
            seen = position < last
            slot = _slots(own_pages, position, seen, PAGE)
            read = seen[:, None] & (d < WIDTH)[None, :]
            k_tile = tl.load(k_head + slot[:, None] * WIDTH + d[None, :], mask=read, other=0.0)
            v_tile = tl.load(v_head + slot[:, None] * WIDTH + d[None, :], mask=read, other=0.0)
            scores = _scores(q_tile, tl.trans(k_tile), scale, softcap, seen[None, :], SOFTCAP, PRECISION)
            top, total, sums = _step(top, total, sums, scores, v_tile, PRECISION)
        if SPLITS == 1:
            answer = sums / tl.where(total == 0.0, 1.0, total)[:, None]
            where = out + (row.to(tl.int64) * HEADS + head)[:, None] * WIDTH + d[None, :]
            tl.store(where, answer.to(out.dtype.element_ty), mask=own)
        else:
            place = (row.to(tl.int64) * HEADS + head) * split_stride + split
            tl.store(sums_out + place[:, None] * PADDED + d[None, :], sums, mask=own)
            tl.store(states + place * 2, top, mask=g < EACH)
            tl.store(states + place * 2 + 1, total, mask=g < EACH)


@triton.jit
def _combine(
    lengths,
    out,
    sums_in,
    states,
    split_stride,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Joins a head's chunks; those past the sequence's end were never written and are not read."""
    row, head = tl.program_id(0), tl.program_id(1)
    seen = tl.load(lengths + row)
    if WINDOW > 0:
        seen = tl.minimum(seen, WINDOW)
    d = tl.arange(0, PADDED)
    place = (row.to(tl.int64) * HEADS + head) * split_stride
    top = tl.load(states + place * 2)
    total = tl.load(states + place * 2 + 1)
    sums = tl.load(sums_in + place * PADDED + d, mask=d < WIDTH, other=0.0)
    for split in range(1, (seen + CHUNK - 1) // CHUNK):
        other = tl.load(states + (place + split) * 2)
        new = tl.maximum(top, other)
        fade, gain = tl.exp2(top - new), tl.exp2(other - new)
        total = total * fade + tl.load(states + (place + split) * 2 + 1) * gain
        part = tl.load(sums_in + (place + split) * PADDED + d, mask=d < WIDTH, other=0.0)
        sums = sums * fade + part * gain
        top = new
    answer = sums / tl.where(total == 0.0, 1.0, total)
    where = out + (row.to(tl.int64) * HEADS + head) * WIDTH + d
    tl.store(where, answer.to(out.dtype.element_ty), mask=d < WIDTH)


@triton.jit
def _prefill(
    q,
    k,
    v,
    tiles,
    pages,
    out,
    q_stride,
    out_stride,
    slots,
    page_stride,
    scale,
    softcap,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """ROWS tokens of one stretch for one query head."""
    # The last tiles of a stretch see most; started first, they do not finish alone.
    tile = tiles + (tl.num_programs(0) - 1 - tl.program_id(0)) * 4
    head = tl.program_id(1)
    stretch, t0, t1, begin = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    t = tl.arange(0, ROWS)
    d = tl.arange(0, PADDED)
    row = (t0 + t).to(tl.int64)[:, None]
    own = (t0 + t < t1)[:, None] & (d < WIDTH)[None, :]
    q_tile = tl.load(q + row * q_stride + head * WIDTH + d[None, :], mask=own, other=0.0)
    k_head = k + (head // GROUP).to(tl.int64) * slots * WIDTH
    v_head = v + (head // GROUP).to(tl.int64) * slots * WIDTH
    own_pages = pages + stretch.to(tl.int64) * page_stride
    at_row = begin + t  # each row's own position
    first = 0
    if WINDOW > 0:
        first = tl.maximum(begin - WINDOW + 1, 0) // STEP * STEP
    last = begin + tl.minimum(t1 - t0, ROWS)  # one past the last row's position
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    for at in range(first, last, STEP):
        position = at + tl.arange(0, STEP)
        there = position < last
        if WINDOW > 0:
            there = there & (position > begin - WINDOW)
        slot = _slots(own_pages, position, there, PAGE)
        read = there[:, None] & (d < WIDTH)[None, :]
        k_tile = tl.load(k_head + slot[:, None] * WIDTH + d[None, :], mask=read, other=0.0)
        v_tile = tl.load(v_head + slot[:, None] * WIDTH + d[None, :], mask=read, other=0.0)
        seen = (position[None, :] <= at_row[:, None]) & there[None, :]
        if WINDOW > 0:
            seen = seen & (position[None, :] > at_row[:, None] - WINDOW)
        scores = _scores(q_tile, tl.trans(k_tile), scale, softcap, seen, SOFTCAP, PRECISION)
        top, total, sums = _step(top, total, sums, scores, v_tile, PRECISION)
    answer = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + row * out_stride + head * WIDTH + d[None, :], answer.to(out.dtype.element_ty), mask=own)
