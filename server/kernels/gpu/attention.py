"""Attention over paged keys and values: one new token a sequence. The kernel is in `attention_rows`.

The meaning is `reference.paged_attention`. Position p of a sequence lies in slot page[p / page_tokens] * page_tokens +
p % page_tokens. Only slots of positions that a token sees are read: whatever else a page holds, NaN included, has no
part in the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.kernels.gpu.attention_rows import decode_rows
from server.kernels.gpu.launch import dependent, early_start, power_of_two, precision, processors

STEP = 64  # stored positions in one tile
MOST = 32  # parts at most, into which a sequence is cut
_PROGRAMS = 16  # of a processor at most; where there are more parts, a program takes several, one after the other
ROWS = 64  # sequences a program looks through for its own part, at least; more: the next power of two
_WARPS = 4
_STAGES = 2
_REGISTERS: int | None = None
# Whether the first keys and values are asked for while the kernel in front ends. What it gains is not known yet.
EARLY = False


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
    decode_rows[(kv_heads, max(1, min(rows * parts, programs // kv_heads)))](
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
        ROWS=1 if rows == 1 else max(ROWS, power_of_two(rows)),
        WINDOW=window or 0,
        SOFTCAP=softcap is not None,
        ROTATE=rotation is not None,
        PRECISION=precision(q),
        EARLY=EARLY and dependent(q.device),
        num_warps=_WARPS,
        num_stages=_STAGES,
        maxnreg=_REGISTERS,
        **early_start(q.device),
    )
    return out
