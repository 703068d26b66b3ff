"""Attention over paged keys and values: one new token a sequence.

The meaning is `reference.paged_attention`. Position p of a sequence lies in slot page[p / page_tokens] * page_tokens +
p % page_tokens. Only slots of positions that a token sees are read: whatever else a page holds, NaN included, has no
part in the answer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gpu.elementwise import turned
from server.kernels.gpu.launch import (
    early_start,
    launch_dependents,
    multiply,
    power_of_two,
    precision,
    processors,
    wait_for_writes,
)
from server.kernels.gpu.paged import LOG2E, capped, pages_of, tile_of

STEP = 64  # stored positions in one tile
MOST = 32  # parts at most, into which a sequence is cut
_PROGRAMS = 16  # of a processor at most; where there are more parts, a program takes several, one after the other
_ROWS = 64  # sequences a program looks through for its own part, at least
_WARPS = 4
_STAGES = 2
_REGISTERS: int | None = None


def most_parts(longest: int) -> int:
    """Parts into which any sequence of up to `longest` tokens is cut."""
    return max(1, min(MOST, -(-longest // STEP)))


class DecodeScratch:
    """What the programs of one decode leave to be joined; serves all layers in turn. `longest`: of any context.

    The counters are zero between launches: whoever joins a sequence's parts resets its own.
    """

    def __init__(self, rows: int, heads: int, width: int, longest: int, device: torch.device | str) -> None:
        self.parts = most_parts(longest)
        self.longest = longest
        padded = power_of_two(width)
        self.sums = torch.empty(rows, heads, self.parts, padded, dtype=torch.float32, device=device)
        self.states = torch.empty(2, rows, heads, self.parts, dtype=torch.float32, device=device)
        self.counters = torch.zeros(rows, heads, dtype=torch.int32, device=device)


def scratch_bytes(rows: int, longest: int, heads: int, width: int) -> int:
    """Device memory of a `DecodeScratch`."""
    return rows * heads * (most_parts(longest) * (power_of_two(width) + 2) + 1) * 4


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
    """One new token a sequence, its key and value stored already; returns [rows, Hq, D].

    q: [rows, Hq, D], rows may be strided; k, v: [Hkv, slots, D]; pages: [rows, P] int32, entries past a sequence's
    end are not read; lengths: [rows] int32, the new token included, at most what `scratch` was made for. A length of
    0 marks a row of padding: it reads nothing and its answer is 0.

    The grid follows the room in `scratch`, not the lengths, and the cuts between programs depend on a sequence's own
    length alone: a captured graph fits later steps, and company changes no answer.
    """
    if q.stride(2) != 1 or q.stride(1) != q.shape[2]:
        raise ValueError("a token's query heads lie side by side")
    return _launch(q, q.shape[1], k, v, pages, lengths, scratch, None, page_tokens, scale, window, softcap)


def decode_new(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    write_slots: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scratch: DecodeScratch,
    *,
    heads: int,
    page_tokens: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`elementwise.rope_store`, then `decode`, in one launch; arguments as theirs."""
    kv_heads, _, width = k.shape
    if qkv.shape[1] != (heads + 2 * kv_heads) * width or qkv.stride(1) != 1 or width % 2:
        raise ValueError(f"{tuple(qkv.shape)} does not hold {heads} query and {kv_heads} key heads of {width}")
    if not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("cos and sin are contiguous")
    return _launch(
        qkv, heads, k, v, pages, lengths, scratch, (cos, sin, write_slots), page_tokens, scale, window, softcap
    )


def _launch(
    q: Tensor,
    heads: int,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    lengths: Tensor,
    scratch: DecodeScratch,
    rotation: tuple[Tensor, Tensor, Tensor] | None,
    page_tokens: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    rows = q.shape[0]
    kv_heads, slots, width = k.shape
    padded = power_of_two(width)
    if scratch.sums.shape[0] < rows or scratch.sums.shape[1] != heads or scratch.sums.shape[3] != padded:
        raise ValueError(f"scratch of {tuple(scratch.sums.shape)} for {rows} queries of {heads} heads of {width}")
    if not k.is_contiguous() or not v.is_contiguous():
        raise ValueError("keys and values are contiguous")
    if slots * width >= 1 << 31:
        raise ValueError(f"{slots} slots of {width} numbers are more than 32 bits count")
    longest = scratch.longest if window is None else min(scratch.longest, window)
    parts = most_parts(longest)
    each = heads // kv_heads
    out = torch.empty(rows, heads, width, dtype=q.dtype, device=q.device)
    cos, sin, write_slots = rotation or (q, q, lengths)
    programs = _PROGRAMS * processors(q.device)
    _decode[(kv_heads, max(1, min(rows * parts, programs // kv_heads)))](
        q,
        k,
        v,
        pages,
        lengths,
        cos,
        sin,
        write_slots,
        out,
        scratch.sums,
        scratch.states,
        scratch.counters,
        rows,
        q.stride(0),
        slots,
        pages.stride(0),
        scratch.parts,
        scratch.states.stride(0),
        scale,
        softcap or 0.0,
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUP=power_of_two(each),
        JOINED=1 << (each - 1).bit_length(),
        WIDTH=width,
        PADDED=padded,
        PAGE=page_tokens,
        STEP=STEP,
        MOST=MOST,
        AT_ONCE=max(1, 8 * _WARPS >> (each - 1).bit_length()),
        LONG=-(-longest // STEP) > MOST,
        ROWS=1 if rows == 1 else max(_ROWS, power_of_two(rows)),
        WINDOW=window or 0,
        SOFTCAP=softcap is not None,
        ROTATE=rotation is not None,
        PRECISION=precision(q),
        num_warps=_WARPS,
        num_stages=_STAGES,
        maxnreg=_REGISTERS,
        **early_start(q.device),
    )
    return out


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
def _decode(
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
    PRECISION: tl.constexpr,
):
    """Parts of sequences for the query heads of one key head.

    The parts of all sequences are counted through, and a program takes every so manieth. What it needs of memory is
    asked for before it is needed: the first tile before the queries are rotated, the next one while one is multiplied.
    """
    launch_dependents(DEPENDENT)
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
