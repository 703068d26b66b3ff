"""The decode step in C, compiled once on the machine that runs it.

torch needs some forty calls a layer for what one token a sequence needs of it, and most of a step goes into starting
them. Here all layers are one call (`decoder.py`), of operations that can also be called singly (`Native`). Where there
is no C compiler, or no OpenMP to share with torch, `load` gives None and the plain-torch versions in
`server/kernels/cpu.py` are used.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from server.kernels.native.library import TYPES, library
from server.kernels.native.plans import SPAN_ROWS, DecodePlan, PrefillPlan, Sites
from server.kernels.native.structs import I64, int64s, pointer

MAX_HEAD_WIDTH = 512  # MAX_WIDTH in common.h


class Native:
    """The compiled kernels for tensors of one dtype. All tensors must be contiguous, on the CPU, of that dtype."""

    def __init__(self, native: ctypes.CDLL, dtype: torch.dtype) -> None:
        suffix = TYPES[dtype]
        self.dtype = dtype
        self._rms_norm = getattr(native, f"rms_norm_{suffix}")
        self._silu_mul = getattr(native, f"silu_mul_{suffix}")
        self._rope_store = getattr(native, f"rope_store_{suffix}")
        self._attention = getattr(native, f"attention_{suffix}")
        self._adapters = getattr(native, f"adapters_{suffix}")
        self._finite_pages = getattr(native, f"finite_pages_{suffix}")
        self.decode = getattr(native, f"decode_{suffix}")

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, late: bool = False) -> Tensor:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension; x: [..., width], weight: [width] float32.

        `late`: the weight is multiplied in before the one rounding (OLMo 2), not after a first one (Llama).
        """
        y = torch.empty_like(x)
        width = x.shape[-1]
        rows = I64(x.numel() // width)
        self._rms_norm(pointer(x), pointer(weight), pointer(y), rows, I64(width), ctypes.c_float(eps), I64(late))
        return y

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up; gate_up: [rows, 2 * width] with gate first → [rows, width]."""
        rows, both = gate_up.shape
        y = torch.empty(rows, both // 2, dtype=gate_up.dtype)
        self._silu_mul(pointer(gate_up), pointer(y), I64(rows), I64(both // 2))
        return y

    def rope_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, write_slots: Tensor, k: Tensor, v: Tensor, heads: int
    ) -> Tensor:
        """Rotate queries and keys, store keys and values at `write_slots`; returns q [rows, heads, width].

        qkv: [rows, (heads + 2 kv_heads) * width]; cos, sin: [rows, rotary] for the first `rotary` elements of a head;
        k, v: [kv_heads, slots, width].
        """
        kv_heads, slots, width = k.shape
        rows = qkv.shape[0]
        q = torch.empty(rows, heads, width, dtype=qkv.dtype)
        self._rope_store(
            *map(pointer, (qkv, cos, sin, write_slots, q, k, v)),
            *map(I64, (rows, heads, kv_heads, width, cos.shape[-1], slots)),
        )
        return q

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: Tensor,
        sequences: Tensor,
        lengths: Tensor,
        pages: Tensor,
        page_tokens: int,
        longest: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """`reference.paged_attention` for rows that look at their sequence's first tokens each; returns q's shape.

        q: [T, heads, width]; k, v: [kv_heads, slots, width]; row rows[i] belongs to sequence sequences[i], whose
        pages are pages[sequences[i]] (pages: [sequences, P]), and looks at lengths[i] <= `longest` tokens, all int64.
        Rows that are not listed come out as zeros.
        """
        _, heads, width = q.shape
        kv_heads, slots, _ = k.shape
        out = torch.zeros_like(q)
        scratch = torch.empty(torch.get_num_threads() * 4 * longest, dtype=torch.float32)
        self._attention(
            *map(pointer, (q, k, v, rows, sequences, lengths, pages, out, scratch)),
            *map(I64, (rows.numel(), heads, kv_heads, width, slots, pages.shape[1], page_tokens, longest)),
            ctypes.c_float(scale),
            I64(window or 0),
            ctypes.c_float(softcap or 0.0),
        )
        return out

    def finite_pages(self, caches: Sequence[Tensor], pages: Sequence[int], page_tokens: int) -> list[bool]:
        """For each page, whether all caches, [kv_heads, slots, width] each, hold finite numbers there."""
        kv_heads, slots, width = caches[0].shape
        finite = int64s([1] * len(pages))
        self._finite_pages(
            (ctypes.c_void_p * len(caches))(*(cache.data_ptr() for cache in caches)),
            *map(I64, (len(caches), kv_heads, slots, width, page_tokens)),
            int64s(pages),
            I64(len(pages)),
            finite,
        )
        return [bool(each) for each in finite]

    def lora(self, x: Tensor, sites: Sites, y: Tensor, decode: DecodePlan | None, prefill: PrefillPlan | None) -> None:
        """Add each row's own deltas in place: `reference.lora_add` for sites that share the input x [rows, in].

        y: [rows, sum of out], the sites' outputs side by side.
        """
        h, scratch = lora_scratch(sites.count, decode, prefill)
        self._adapters(
            sites.array,
            I64(sites.count),
            pointer(x),
            I64(x.shape[-1]),
            pointer(y),
            I64(y.shape[-1]),
            None if decode is None else ctypes.byref(decode.struct),
            None if prefill is None else prefill.structs,
            I64(0 if prefill is None else prefill.layers),
            pointer(h),
            pointer(scratch),
        )


def lora_scratch(sites: int, decode: DecodePlan | None, prefill: PrefillPlan | None) -> tuple[Tensor, Tensor]:
    """Work space of the two plans, float32."""
    widest = 0 if prefill is None else prefill.widest
    return (
        torch.empty(0 if decode is None else sites * decode.ranks, dtype=torch.float32),
        torch.empty(torch.get_num_threads() * SPAN_ROWS * widest, dtype=torch.float32),
    )


@functools.cache
def load(dtype: torch.dtype) -> Native | None:
    """The kernels for `dtype`, or None: another dtype, no C compiler."""
    native = library() if dtype in TYPES else None
    return Native(native, dtype) if native is not None else None
