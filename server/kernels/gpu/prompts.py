"""Attention over paged keys and values: stretches of prompts.

The meaning is `reference.paged_attention`; where positions lie, see `attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gpu.launch import multiply, power_of_two, precision
from server.kernels.gpu.paged import LOG2E, capped, pages_of, tile_of

ROWS = 128  # prompt tokens in one tile
STEP = 64  # positions in one tile
_WARPS = 8
_STAGES = 2
_REGISTERS: int | None = None


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
        for t in range(t0, t1, ROWS):
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
    if slots * width >= 1 << 31:
        raise ValueError(f"{slots} slots of {width} numbers are more than 32 bits count")
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
        ROWS=ROWS,
        STEP=STEP,
        WINDOW=window or 0,
        SOFTCAP=softcap is not None,
        PRECISION=precision(q),
        num_warps=_WARPS,
        num_stages=_STAGES,
        maxnreg=_REGISTERS,
    )


@triton.jit
def _bits(x):
    """As integers: a carried operand of a product stays in registers that way."""
    return x.to(tl.int32 if x.dtype == tl.float32 else tl.int16, bitcast=True)


@triton.jit
def _numbers(bits, like):
    return bits.to(like.dtype, bitcast=True)


@triton.jit
def _weigh(top, total, scores, scale, SOFTCAP: tl.constexpr, EMPTY: tl.constexpr):
    """One tile more of a running softmax: weights, and what to multiply earlier sums with.

    scores: before `scale`, with SOFTCAP after it and capped.

    With EMPTY, rows may have seen nothing yet."""
    factor = LOG2E if SOFTCAP else scale * LOG2E
    new = tl.maximum(top, tl.max(scores, 1) * factor)
    base = new
    if EMPTY:
        base = tl.where(new == float("-inf"), 0.0, new)
    weights = tl.exp2(scores * factor - base[:, None])
    fade = tl.exp2(top - base)
    return new, total * fade + tl.sum(weights, 1), weights, fade


@triton.jit(do_not_specialize=["page_stride"])  # it follows the longest prompt
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
    """ROWS tokens of one stretch for one query head.

    Tiles of positions that every row sees whole come first and are masked nowhere; those on the diagonal follow.
    """
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
    floor = begin - WINDOW + 1 if WINDOW > 0 else 0  # positions before this are seen by no row, and not read
    whole = (begin + 1) // STEP * STEP  # positions before this are seen by all rows
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    fade = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, PADDED], dtype=tl.float32)
    zero = tl.zeros([ROWS, STEP], dtype=tl.float32)
    # Values are multiplied one tile late, while the next one's weights are computed; before the first by zeros.
    weights = _bits(tl.zeros([ROWS, STEP], dtype=q.dtype.element_ty))
    page = pages_of(own_pages, first, last, STEP, PAGE)
    page_before = page
    for at in range(first, whole, STEP):
        k_tile = tile_of(k_head, page, at, floor, last, WINDOW > 0, STEP, PAGE, WIDTH, PADDED)
        v_tile = tile_of(
            v_head, page_before, tl.maximum(at - STEP, first), floor, last, WINDOW > 0, STEP, PAGE, WIDTH, PADDED
        )
        page_before = pages_of(own_pages, at, last, STEP, PAGE)
        page = pages_of(own_pages, at + STEP, last, STEP, PAGE)
        scores = multiply(q_tile, tl.trans(k_tile), zero, PRECISION)
        sums = multiply(_numbers(weights, v_tile), v_tile, sums * fade[:, None], PRECISION)
        if SOFTCAP:
            scores = capped(scores * scale, softcap)
        if WINDOW > 0:
            position = at + tl.arange(0, STEP)
            scores = tl.where(position[None, :] > at_row[:, None] - WINDOW, scores, float("-inf"))
        top, total, fresh, fade = _weigh(top, total, scores, scale, SOFTCAP, WINDOW > 0)
        weights = _bits(fresh.to(q.dtype.element_ty))
    for at in range(tl.maximum(whole, first), last, STEP):
        k_tile = tile_of(k_head, page, at, floor, last, True, STEP, PAGE, WIDTH, PADDED)
        v_tile = tile_of(
            v_head, page_before, tl.maximum(at - STEP, first), floor, last, True, STEP, PAGE, WIDTH, PADDED
        )
        page_before = pages_of(own_pages, at, last, STEP, PAGE)
        page = pages_of(own_pages, at + STEP, last, STEP, PAGE)
        scores = multiply(q_tile, tl.trans(k_tile), zero, PRECISION)
        sums = multiply(_numbers(weights, v_tile), v_tile, sums * fade[:, None], PRECISION)
        if SOFTCAP:
            scores = capped(scores * scale, softcap)
        position = at + tl.arange(0, STEP)
        seen = position[None, :] <= at_row[:, None]
        if WINDOW > 0:
            seen = seen & (position[None, :] > at_row[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        top, total, fresh, fade = _weigh(top, total, scores, scale, SOFTCAP, WINDOW > 0)
        weights = _bits(fresh.to(q.dtype.element_ty))
    final = tl.maximum((last - 1) // STEP * STEP, first)
    v_tile = tile_of(v_head, page_before, final, floor, last, True, STEP, PAGE, WIDTH, PADDED)
    sums = multiply(_numbers(weights, v_tile), v_tile, sums * fade[:, None], PRECISION)
    answer = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + row * out_stride + head * WIDTH + d[None, :], answer.to(out.dtype.element_ty), mask=own)
