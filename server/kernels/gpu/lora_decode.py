"""The LoRA kernels of decode steps: few tokens a group, many adapters, so what counts is bytes under way.

    h[t, r] = x[t] . a[r]                      in `splits` parts of the input                    (shrink)
    y[t]   += sum over them of weight * h[t, r] * b[r]                                          (expand)

A unit of work reads its row of the plan, then all of its adapter's numbers in one go, and nothing of it is read twice.
Adapter rows do not change within a step, so a program fetches its first unit's before the kernel in front has ended
(programmatic dependent launch), and only then waits for what that one writes.

The tile of a tensor core is turned: its long side lies along the adapter's numbers, its short one takes the tokens.
Sums are cut and joined in an order that depends on the layer's widths alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from server.kernels.gpu.launch import launch_dependents, multiply, wait_for_writes
from server.kernels.gpu.lora_plan import GROUP, HEADER, PIECE

_HEADER = tl.constexpr(HEADER)
_GROUP = tl.constexpr(GROUP)
_PIECE = tl.constexpr(PIECE)


@triton.jit
def shrink_rows(
    x,
    plan,
    table,
    h,
    x_stride,
    PIECES_AT: tl.constexpr,
    SITES: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARE: tl.constexpr,
    WARPS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h[piece, site, split] = x[tokens, part] . a[rows, part]; a unit is one (piece, site, split).

    Every warp multiplies a part of its own, so their chains of products are short; then they are added up.
    """
    launch_dependents(DEPENDENT)
    EACH: tl.constexpr = 128  # inputs a warp takes at once
    STEP: tl.constexpr = WARPS * EACH
    EVEN: tl.constexpr = WIDTH == SHARE * SPLITS and SHARE % STEP == 0
    t = tl.arange(0, TOKENS)
    r = tl.arange(0, RANKS)
    part = tl.arange(0, WARPS)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    units = tl.load(plan + 1) * (SITES * SPLITS)
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        split = unit % SPLITS
        site = unit // SPLITS % SITES
        here = plan + PIECES_AT + unit // (SITES * SPLITS) * _PIECE
        t0, tokens, r0, ranks = tl.load(here), tl.load(here + 1), tl.load(here + 2), tl.load(here + 3)
        a = tl.load(table + site).to(tl.pointer_type(x.dtype.element_ty))
        if ALIGNED:
            a = tl.multiple_of(a, 16)
        a_rows = a + (r0 + r).to(tl.int64)[None, :, None] * WIDTH
        x_rows = x + (t0 + t).to(tl.int64)[None, None, :] * x_stride
        r_seen = (r < ranks)[None, :, None]
        t_seen = (t < tokens)[None, None, :]
        total = tl.zeros([WARPS, RANKS, TOKENS], dtype=tl.float32)
        for step in tl.static_range(0, SHARE, STEP):
            k = split * SHARE + step + part
            a_at = a_rows + k[:, None, :]
            x_at = x_rows + k[:, :, None]
            if EVEN:
                a_tile = tl.load(a_at, mask=r_seen, other=0.0)
                wait_for_writes(DEPENDENT)
                x_tile = tl.load(x_at, mask=t_seen, other=0.0)
            else:
                inside = (k < WIDTH) & (step + part < SHARE)
                a_tile = tl.load(a_at, mask=r_seen & inside[:, None, :], other=0.0)
                wait_for_writes(DEPENDENT)
                x_tile = tl.load(x_at, mask=t_seen & inside[:, :, None], other=0.0)
            total = multiply(a_tile, x_tile, total, PRECISION)
        out = h + (unit * TOKENS + t).to(tl.int64)[None, :] * RANKS + r[:, None]
        tl.store(out, tl.sum(total, 0), mask=(r < ranks)[:, None] & (t < tokens)[None, :])
    wait_for_writes(DEPENDENT)  # with no unit too: who waits for this kernel counts on all before it


@triton.jit
def expand_rows(
    y,
    plan,
    tiles,
    h,
    y_stride,
    PIECES_AT: tl.constexpr,
    SITES: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[tokens, columns] += sum over the group's pieces; a unit is one (group, tile of columns).

    One program does all pieces of its tokens, so y is read and rounded once and nobody else writes there.
    """
    launch_dependents(DEPENDENT)
    t = tl.arange(0, TOKENS)
    r = tl.arange(0, RANKS)
    n = tl.arange(0, COLUMNS)
    units = tl.load(plan) * TILES
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        group = plan + _HEADER + unit // TILES * _GROUP
        tile = tiles + unit % TILES * 4
        t0, tokens = tl.load(group), tl.load(group + 1)
        first, last = tl.load(group + 2), tl.load(group + 3)
        r0, ranks = tl.load(group + 4), tl.load(group + 5)
        weight = tl.load(group + 6).to(tl.float32, bitcast=True)
        b = tl.load(tile).to(tl.pointer_type(y.dtype.element_ty))
        width, left = tl.load(tile + 1), tl.load(tile + 2)
        y0, site = (tl.load(tile + 3) & 0xFFFFFFFF).to(tl.int32), (tl.load(tile + 3) >> 32).to(tl.int32)
        if ALIGNED:
            b, width = tl.multiple_of(b, 16), tl.multiple_of(width, 8)
            left, y0 = tl.multiple_of(left, 8), tl.multiple_of(y0, 8)
        n_seen = n < left
        t_seen = t < tokens
        total = tl.zeros([COLUMNS, TOKENS], dtype=tl.float32)
        for piece in range(first, last):
            b_tile = tl.load(
                b + (r0 + r).to(tl.int64)[:, None] * width + n[None, :],
                mask=(r < ranks)[:, None] & n_seen[None, :],
                other=0.0,
            )
            wait_for_writes(DEPENDENT)
            part = h + ((piece * SITES + site).to(tl.int64) * (SPLITS * TOKENS) + t)[:, None] * RANKS + r[None, :]
            seen = t_seen[:, None] & (r < ranks)[None, :]
            low = tl.zeros([TOKENS, RANKS], dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                low += tl.load(part + split * (TOKENS * RANKS), mask=seen, other=0.0)
            low *= weight
            if piece + 1 < last:
                here = plan + PIECES_AT + (piece + 1) * _PIECE
                r0, ranks = tl.load(here + 2), tl.load(here + 3)
                weight = tl.load(here + 4).to(tl.float32, bitcast=True)
            total = multiply(tl.trans(b_tile), tl.trans(low.to(b_tile.dtype)), total, PRECISION)
        out = y + (t0 + t).to(tl.int64)[:, None] * y_stride + (y0 + n)[None, :]
        mask = t_seen[:, None] & n_seen[None, :]
        base = tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, (base + tl.trans(total)).to(y.dtype.element_ty), mask=mask)
    wait_for_writes(DEPENDENT)
