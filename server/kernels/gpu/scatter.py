"""From one stretch of memory to many: an adapter's halves from where they arrived to their rows in the arena.

An adapter over all linears of an 8B model is 448 small matrices. Copied one by one over the bus, starting the copies
takes as long as the bytes do; so they come as a few large copies into a staging buffer on the device, and one launch
after each puts them where they belong.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_STEP = 1024  # elements a program moves at a time
_PROGRAMS = 16  # for each piece, at most


def scatter(source: Tensor | None, like: Tensor, pieces: Tensor, longest: int, *, aligned: bool) -> None:
    """Copy stretches of `source` [n], contiguous, of `like`'s dtype, to other memory; zeros where `source` is None.

    pieces: [count, 3] int64: (address to write to, first element of `source`, elements, at most `longest`). What is
    written must not overlap. `aligned`: all addresses are multiples of 16, all other numbers of 8.
    """
    if pieces.shape[0]:
        programs = min(_PROGRAMS, -(-longest // _STEP))
        _scatter[(pieces.shape[0], programs)](
            like if source is None else source, pieces, ZERO=source is None, ALIGNED=aligned, STEP=_STEP, num_warps=4
        )


@triton.jit
def _scatter(source, pieces, ZERO: tl.constexpr, ALIGNED: tl.constexpr, STEP: tl.constexpr):
    piece = pieces + tl.program_id(0) * 3
    target = tl.load(piece).to(tl.pointer_type(source.dtype.element_ty))
    start, count = tl.load(piece + 1), tl.load(piece + 2)
    if ALIGNED:
        target = tl.multiple_of(target, 16)
        start, count = tl.multiple_of(start, 8), tl.multiple_of(count, 8)
    k = tl.arange(0, STEP)
    for at in range(tl.program_id(1) * STEP, count, tl.num_programs(1) * STEP):
        inside = at + k < count
        if ZERO:
            value = tl.zeros([STEP], dtype=source.dtype.element_ty)
        else:
            value = tl.load(source + start + at + k, mask=inside, other=0.0)
        tl.store(target + at + k, value, mask=inside)
