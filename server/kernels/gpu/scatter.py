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


def scatter(source: Tensor, pieces: Tensor, longest: int) -> None:
    """Copy stretches of `source` [n], contiguous, to other memory of its dtype.

    pieces: [count, 3] int64: (address to write to, first element of `source` or -1 for zeros, elements, at most
    `longest`). What is written must not overlap.
    """
    if pieces.shape[0]:
        programs = min(_PROGRAMS, -(-longest // _STEP))
        _scatter[(pieces.shape[0], programs)](source, pieces, STEP=_STEP, num_warps=4)


@triton.jit
def _scatter(source, pieces, STEP: tl.constexpr):
    piece = pieces + tl.program_id(0) * 3
    target = tl.load(piece).to(tl.pointer_type(source.dtype.element_ty))
    start, count = tl.load(piece + 1), tl.load(piece + 2)
    k = tl.arange(0, STEP)
    for at in range(tl.program_id(1) * STEP, count, tl.num_programs(1) * STEP):
        inside = at + k < count
        value = tl.load(source + start + at + k, mask=inside & (start >= 0), other=0.0)
        tl.store(target + at + k, value, mask=inside)
