"""The kernel of attention for one new token a sequence; launched by `attention`, which tells what its arguments are."""

from __future__ import annotations

import triton
import triton.language as tl

from server.kernels.gpu.elementwise import turned
from server.kernels.gpu.launch import launch_dependents, multiply, wait_for_writes
from server.kernels.gpu.paged import LOG2E, ask_for, capped, pages_of, tile_of


@triton.jit
def _cut(stored, STEP: tl.constexpr, MOST: tl.constexpr, LONG: tl.constexpr):
    """(tiles in each part, parts) of a sequence with so many stored positions to see."""
    tiles = (stored + STEP - 1) // STEP
    each = tiles * 0 + 1
    if LONG:
        each = tl.maximum((tiles + MOST - 1) // MOST, 1)
        tiles = (tiles + each - 1) // each
    return each, tl.maximum(tiles, 1)


@triton.jit
def _seen(length, WINDOW: tl.constexpr, ROTATE: tl.constexpr):
    """(first, one past the last) stored position that the new token of a sequence sees; its own is not among them
    where it is still to be stored."""
    last = length
    if ROTATE:
        last = tl.maximum(length - 1, 0)
    start = length * 0
    if WINDOW > 0:
        start = tl.maximum(length - WINDOW, 0)
    return start, last


@triton.jit
def _store(
    given,
    cos,
    sin,
    slot,
    asked,
    k_head,
    v_head,
    kv_head,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Rotates the key of a new token and stores it and its value; both [GROUP, PADDED], every row alike, zeros where
    not `asked`. given: the token's q, k and v."""
    HALF: tl.constexpr = WIDTH // 2
    once = tl.arange(0, GROUP)[:, None]
    d = tl.arange(0, PADDED)[None, :] + once * 0
    key = given + (HEADS + kv_head) * WIDTH
    low = tl.load(key + d, mask=asked, other=0.0)
    high = tl.load(key + (tl.arange(0, PADDED)[None, :] + HALF) % WIDTH + once * 0, mask=asked, other=0.0)
    value = tl.load(key + KV_HEADS * WIDTH + d, mask=asked, other=0.0)
    rotated = turned(low, high, cos, sin, d < HALF)
    first = asked & (once == 0) & (slot >= 0)
    tl.store(k_head + slot * WIDTH + d, rotated, mask=first)
    tl.store(v_head + slot * WIDTH + d, value, mask=first)
    return rotated, value


@triton.jit(do_not_specialize=["rows", "page_stride", "part_stride", "state_stride"])
def decode_rows(
    q,
    k,
    v,
    pages,
    lengths,
    cos,
    sin,
    write_slots,
    out,
    sums_out,
    states,
    counters,
    rows,
    q_stride,
    slots,
    page_stride,
    part_stride,
    state_stride,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    JOINED: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PAGE: tl.constexpr,
    STEP: tl.constexpr,
    MOST: tl.constexpr,
    AT_ONCE: tl.constexpr,
    LONG: tl.constexpr,
    ROWS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROTATE: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EARLY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Parts of sequences for the query heads of one key head.

    The parts of all sequences are counted through, and a program takes every so manieth. What it needs of memory is
    asked for before it is needed: the first tile before the queries are rotated (with EARLY before they are there), the
    next one while one is multiplied.
    """
    launch_dependents(DEPENDENT)
    if not EARLY:
        wait_for_writes(DEPENDENT)
    EACH: tl.constexpr = HEADS // KV_HEADS
    ITEMS: tl.constexpr = 1 << 18  # more than all parts of all sequences
    HALF: tl.constexpr = WIDTH // 2
    kv_head = tl.program_id(0)
    g = tl.arange(0, GROUP)
    d = tl.arange(0, PADDED)
    head = kv_head * EACH + g
    own = (g < EACH)[:, None] & (d < WIDTH)[None, :]
    partner = (d + HALF) % WIDTH
    k_head = k + kv_head.to(tl.int64) * slots * WIDTH
    v_head = v + kv_head.to(tl.int64) * slots * WIDTH
    if ROWS == 1:
        starts, storeds = _seen(tl.load(lengths), WINDOW, ROTATE)
        _, count = _cut(storeds - starts, STEP, MOST, LONG)
        ends = count
    else:
        r = tl.arange(0, ROWS)
        starts, storeds = _seen(tl.load(lengths + r, mask=r < rows, other=0), WINDOW, ROTATE)
        _, counts = _cut(storeds - starts, STEP, MOST, LONG)
        counts = tl.where(r < rows, counts, 0)
        ends = tl.cumsum(counts, 0)
        count = tl.sum(counts, 0)
    for item in tl.range(tl.program_id(1), count, tl.num_programs(1), num_stages=1):
        row = item * 0
        part = item
        if ROWS > 1:
            # Both in one reduction: how many sequences end before it, and where the last of them ends.
            before = tl.max(tl.where(ends <= item, (r + 1) * ITEMS + ends, 0), 0)
            row = before // ITEMS
            part = item - before % ITEMS
        length = tl.load(lengths + row)
        start, stored = _seen(length, WINDOW, ROTATE)
        each, parts = _cut(stored - start, STEP, MOST, LONG)
        first = start + part * each * STEP
        last = tl.minimum(first + each * STEP, stored)
        own_pages = pages + row.to(tl.int64) * page_stride
        page = pages_of(own_pages, first, last, STEP, PAGE)
        if EARLY:
            # Stored by earlier steps: the kernel in front, which makes q, does not touch it.
            ask_for(k_head, page, first, STEP, PAGE, WIDTH)
            ask_for(v_head, page, first, STEP, PAGE, WIDTH)
            wait_for_writes(DEPENDENT)
        given = q + row.to(tl.int64) * q_stride
        q_tile = tl.load(given + head[:, None] * WIDTH + d[None, :], mask=own, other=0.0)
        top = tl.full([GROUP], float("-inf"), dtype=tl.float32)
        extra = tl.zeros([GROUP], dtype=tl.float32)
        sums = tl.zeros([GROUP, PADDED], dtype=tl.float32)
        if ROTATE:
            angle = row * WIDTH + d[None, :] + g[:, None] * 0
            cos_row = tl.load(cos + angle, mask=own, other=0.0).to(tl.float32)
            sin_row = tl.load(sin + angle, mask=own, other=0.0).to(tl.float32)
            across = tl.load(given + head[:, None] * WIDTH + partner[None, :], mask=own, other=0.0)
            newest = (part == parts - 1) & (length > 0)
            slot = tl.load(write_slots + row).to(tl.int64)
            key, value = _store(
                given,
                cos_row,
                sin_row,
                slot,
                own & newest,
                k_head,
                v_head,
                kv_head,
                HEADS,
                KV_HEADS,
                GROUP,
                WIDTH,
                PADDED,
            )
            q_tile = turned(q_tile, across, cos_row, sin_row, (d < HALF)[None, :])
            score = tl.sum(q_tile.to(tl.float32) * key.to(tl.float32), 1) * scale
            if SOFTCAP:
                score = capped(score, softcap)
            top = tl.where(newest, score * LOG2E, float("-inf"))
            extra = tl.where(newest, extra + 1.0, 0.0)
            sums = sums + value.to(tl.float32)
        total = tl.zeros([GROUP, STEP], dtype=tl.float32)
        for at in tl.range(first, last, STEP):
            k_tile = tile_of(k_head, page, at, None, last, True, STEP, PAGE, WIDTH, PADDED)
            v_tile = tile_of(v_head, page, at, None, last, True, STEP, PAGE, WIDTH, PADDED)
            page = pages_of(own_pages, at + STEP, last, STEP, PAGE)
            scores = multiply(q_tile, tl.trans(k_tile), tl.zeros([GROUP, STEP], dtype=tl.float32), PRECISION) * scale
            if SOFTCAP:
                scores = capped(scores, softcap)
            seen = at + tl.arange(0, STEP) < last
            scores = tl.where(seen[None, :], scores * LOG2E, float("-inf"))
            new = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new[:, None])
            fade = tl.exp2(top - new)
            total = total * fade[:, None] + weights
            extra = extra * fade
            sums = multiply(weights.to(v_tile.dtype), v_tile, sums * fade[:, None], PRECISION)
            top = new
        whole = extra + tl.sum(total, 1)
        if parts == 1:
            answer = sums / tl.where(whole == 0.0, 1.0, whole)[:, None]
            where = out + (row * HEADS + head)[:, None] * WIDTH + d[None, :]
            tl.store(where, answer.to(out.dtype.element_ty), mask=own)
        else:
            place = (row * HEADS + head) * part_stride + part
            tl.store(sums_out + place.to(tl.int64)[:, None] * PADDED + d[None, :], sums, mask=own)
            tl.store(states + place, top, mask=g < EACH)
            tl.store(states + state_stride + place, whole, mask=g < EACH)
            # All threads' shares are written before one of them counts; whoever counts last sees everybody's.
            tl.debug_barrier()
            done = tl.atomic_add(counters + row * KV_HEADS + kv_head, 1, sem="acq_rel")
            if done == parts - 1:
                _join(
                    out,
                    sums_out,
                    states,
                    states + state_stride,
                    row,
                    kv_head,
                    parts,
                    part_stride,
                    HEADS,
                    EACH,
                    JOINED,
                    WIDTH,
                    PADDED,
                    MOST,
                    AT_ONCE,
                )
                tl.store(counters + row * KV_HEADS + kv_head, 0)
    if EARLY:
        wait_for_writes(DEPENDENT)  # with no part too: who waits for this kernel counts on all that came before it


@triton.jit
def _join(
    out,
    sums_in,
    tops,
    totals,
    row,
    kv_head,
    parts,
    part_stride,
    HEADS: tl.constexpr,
    EACH: tl.constexpr,
    JOINED: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    MOST: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Adds up the parts of a sequence, in their own order and not in that of their arrival."""
    e = tl.arange(0, JOINED)
    d = tl.arange(0, PADDED)
    line = (row * HEADS + kv_head * EACH + e) * part_stride
    s = tl.arange(0, MOST)
    there = (e < EACH)[:, None] & (s < parts)[None, :]
    states = tl.load(tops + line[:, None] + s[None, :], mask=there, other=float("-inf"), cache_modifier=".cg")
    shares = tl.load(totals + line[:, None] + s[None, :], mask=there, other=0.0, cache_modifier=".cg")
    top = tl.max(states, 1)
    top = tl.where(e < EACH, top, 0.0)
    total = tl.sum(shares * tl.exp2(states - top[:, None]), 1)
    sums = tl.zeros([JOINED, PADDED], dtype=tl.float32)
    for at in tl.range(0, parts, AT_ONCE, num_stages=1):
        p = at + tl.arange(0, AT_ONCE)
        some = (e < EACH)[:, None] & (p < parts)[None, :]
        place = line[:, None] + p[None, :]
        gain = tl.exp2(tl.load(tops + place, mask=some, other=float("-inf"), cache_modifier=".cg") - top[:, None])
        read = some[:, :, None] & (d < WIDTH)[None, None, :]
        share = tl.load(
            sums_in + place.to(tl.int64)[:, :, None] * PADDED + d[None, None, :],
            mask=read,
            other=0.0,
            cache_modifier=".cg",
        )
        sums += tl.sum(share * gain[:, :, None], 1)
    answer = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    where = out + (row * HEADS + kv_head * EACH + e)[:, None] * WIDTH + d[None, :]
    tl.store(where, answer.to(out.dtype.element_ty), mask=(e < EACH)[:, None] & (d < WIDTH)[None, :])
