"""What attention's kernels have in common: where a position lies, and one step of a running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def pages_of(own_pages, at, last, STEP: tl.constexpr, PAGE: tl.constexpr):
    """The page of each of STEP positions from `at` on; 0 from `last` on, where nothing is read."""
    position = at + tl.arange(0, STEP)
    return tl.load(own_pages + position // PAGE, mask=position < last, other=0)


@triton.jit
def tile_of(
    head,
    page,
    at,
    floor,
    last,
    MASKED: tl.constexpr,
    STEP: tl.constexpr,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Keys or values of one head at the STEP positions from `at` on; with MASKED zeros before `floor` and
    from `last` on, where nothing is read."""
    d = tl.arange(0, PADDED)
    position = at + tl.arange(0, STEP)
    where = (page * PAGE + position % PAGE)[:, None] * WIDTH + d[None, :]
    if MASKED:
        seen = position < last
        if floor is not None:
            seen = seen & (position >= floor)
        read = seen[:, None]
        if WIDTH < PADDED:
            read = read & (d < WIDTH)[None, :]
        tile = tl.load(head + where, mask=read, other=0.0)
    elif WIDTH < PADDED:
        tile = tl.load(head + where, mask=(page >= 0)[:, None] & (d < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(head + where)
    return tile


@triton.jit
def ask_for(head, page, at, STEP: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr):
    """Have the second cache fetch one head's keys or values at STEP positions; nobody waits for them. Where a position
    has no page, those of page 0 are asked for in vain."""
    LINE: tl.constexpr = 1024 // head.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
    position = at + tl.arange(0, STEP)
    row = head + (page * PAGE + position % PAGE) * WIDTH
    for line in tl.static_range(0, WIDTH, LINE):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [row + line], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def capped(scores, softcap):
    """softcap * tanh(scores / softcap), by way of exp; beyond its limits exp overflows to infinity and the quotient
    to the right sign."""
    return softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
