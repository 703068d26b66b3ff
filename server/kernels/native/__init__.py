"""The decode step's small operations in C, compiled once on the machine that runs them.

torch needs some forty calls a layer for what one token a sequence needs of it, and most of a step goes into starting
them. These kernels do the same in six. Where there is no C compiler, or no OpenMP to share with torch, `load` gives
None and the plain-torch versions in `server/kernels/cpu.py` are used.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.native.build import build

# No -ffast-math: it would let the compiler assume that nothing is NaN, and NaN is how a bad row is found.
_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros")
_TYPES = {torch.bfloat16: "bf16", torch.float32: "f32"}
MAX_HEAD_WIDTH = 512
SPAN_ROWS = 16  # SPAN in kernels_both.c


class Native:
    """The compiled kernels for tensors of one dtype. All tensors must be contiguous, on the CPU, of that dtype."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        suffix = _TYPES[dtype]
        self._rms_norm = getattr(library, f"rms_norm_{suffix}")
        self._silu_mul = getattr(library, f"silu_mul_{suffix}")
        self._rope_store = getattr(library, f"rope_store_{suffix}")
        self._paged_decode = getattr(library, f"paged_decode_{suffix}")
        self._lora_decode = getattr(library, f"lora_decode_{suffix}")
        self._lora_prefill = getattr(library, f"lora_prefill_{suffix}")

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x²) + eps) * weight over the last dimension; x: [..., width]."""
        y = torch.empty_like(x)
        width = x.shape[-1]
        self._rms_norm(
            _pointer(x), _pointer(weight), _pointer(y), _i64(x.numel() // width), _i64(width), ctypes.c_float(eps)
        )
        return y

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up; gate_up: [rows, 2 * width] with gate first → [rows, width]."""
        rows, both = gate_up.shape
        y = torch.empty(rows, both // 2, dtype=gate_up.dtype)
        self._silu_mul(_pointer(gate_up), _pointer(y), _i64(rows), _i64(both // 2))
        return y

    def rope_store(
        self, qkv: Tensor, cos: Tensor, sin: Tensor, write_slots: Tensor, k: Tensor, v: Tensor, heads: int
    ) -> Tensor:
        """Rotate queries and keys, store keys and values at `write_slots`; returns q [rows, heads, width].

        qkv: [rows, (heads + 2 kv_heads) * width]; cos, sin: [rows, width]; k, v: [kv_heads, slots, width].
        """
        kv_heads, slots, width = k.shape
        rows = qkv.shape[0]
        q = torch.empty(rows, heads, width, dtype=qkv.dtype)
        self._rope_store(
            *map(_pointer, (qkv, cos, sin, write_slots, q, k, v)),
            *map(_i64, (rows, heads, kv_heads, width, slots)),
        )
        return q

    def paged_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pages: Tensor,
        lengths: Tensor,
        longest: int,
        page_tokens: int,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """`reference.paged_attention` for one new token a sequence; returns [rows, heads, width].

        q: [rows, heads, width]; k, v: [kv_heads, slots, width]; pages: [rows * P] int64; lengths: [rows] int64, the
        new token included, none above `longest`.
        """
        rows, heads, width = q.shape
        kv_heads, slots, _ = k.shape
        out = torch.empty_like(q)
        scratch = torch.empty(torch.get_num_threads() * (heads // kv_heads) * longest, dtype=torch.float32)
        self._paged_decode(
            *map(_pointer, (q, k, v, pages, lengths, out, scratch)),
            *map(_i64, (rows, heads, kv_heads, width, slots, pages.numel() // rows, page_tokens, longest)),
            ctypes.c_float(scale),
            _i64(window or 0),
            ctypes.c_float(softcap or 0.0),
        )
        return out

    def lora_decode(self, x: Tensor, sites: Sites, ys: Sequence[Tensor], plan: DecodePlan) -> None:
        """Add each row's own deltas in place: `reference.lora_add` for sites that share the input x [rows, in].

        ys: one [rows, out] each, rows may be strided.
        """
        scratch = torch.empty(len(ys) * plan.rows, dtype=torch.float32)
        self._lora_decode(
            _pointer(x),
            sites.a,
            sites.b,
            (ctypes.c_void_p * len(ys))(*(y.data_ptr() for y in ys)),
            sites.out,
            (ctypes.c_int64 * len(ys))(*(y.stride(0) for y in ys)),
            _i64(len(ys)),
            _i64(x.shape[-1]),
            plan.tokens,
            plan.first,
            _i64(plan.token_count),
            plan.r0,
            plan.r1,
            plan.weight,
            plan.offset,
            _i64(plan.items),
            _pointer(scratch),
        )

    def lora_prefill(self, x: Tensor, sites: Sites, ys: Sequence[Tensor], plan: PrefillPlan) -> None:
        """The same for segments of many rows."""
        scratch = torch.empty(torch.get_num_threads() * SPAN_ROWS * plan.widest, dtype=torch.float32)
        strides = (ctypes.c_int64 * len(ys))(*(y.stride(0) for y in ys))
        pointers = (ctypes.c_void_p * len(ys))(*(y.data_ptr() for y in ys))
        for layer in plan.layers:
            self._lora_prefill(
                *(_pointer(x), sites.a, sites.b, pointers, sites.out, strides, _i64(len(ys)), _i64(x.shape[-1])),
                *(plan.t1, plan.r0, plan.r1, plan.weight, layer.segment, layer.start, _i64(layer.pieces)),
                *(_pointer(scratch), _i64(plan.widest)),
            )


class Sites:
    """The arena matrices of linears that share their input, as the kernel wants them; keeps them alive."""

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        self._alive = (*a, *b)
        self.a = (ctypes.c_void_p * len(a))(*(t.data_ptr() for t in a))
        self.b = (ctypes.c_void_p * len(b))(*(t.data_ptr() for t in b))
        self.out = (ctypes.c_int64 * len(b))(*(t.shape[1] for t in b))


class DecodePlan:
    """Which arena rows apply to which decoding rows, as the kernel wants it; built once for many layers and steps."""

    def __init__(self, segments: Sequence[tuple[int, int, int, int, float]]) -> None:
        """segments: (t0, t1, r0, r1, weight) as in `reference.lora_add`."""
        by_token: dict[int, list[tuple[int, int, float]]] = {}
        for t0, t1, r0, r1, weight in segments:
            for token in range(t0, t1):
                by_token.setdefault(token, []).append((r0, r1, weight))
        tokens = sorted(by_token)
        flat = [item for token in tokens for item in by_token[token]]
        self.items = len(flat)
        self.token_count = len(tokens)
        self.tokens = _array(tokens)
        self.first = _array(_sums(len(by_token[token]) for token in tokens))
        self.r0 = _array([r0 for r0, _, _ in flat])
        self.r1 = _array([r1 for _, r1, _ in flat])
        self.weight = (ctypes.c_float * len(flat))(*(weight for _, _, weight in flat))
        offsets = _sums(r1 - r0 for r0, r1, _ in flat)
        self.offset = _array(offsets)
        self.rows = offsets[-1]


@dataclass(frozen=True)
class _Layer:
    """Pieces of segments none of which overlap."""

    segment: ctypes.Array[ctypes.c_int64]
    start: ctypes.Array[ctypes.c_int64]
    pieces: int


class PrefillPlan:
    """Which arena rows apply to which spans of rows, cut into pieces for the threads."""

    def __init__(self, segments: Sequence[tuple[int, int, int, int, float]]) -> None:
        """segments: (t0, t1, r0, r1, weight) as in `reference.lora_add`."""
        self.t1 = _array([t1 for _, t1, _, _, _ in segments])
        self.r0 = _array([r0 for _, _, r0, _, _ in segments])
        self.r1 = _array([r1 for _, _, _, r1, _ in segments])
        self.weight = (ctypes.c_float * len(segments))(*(weight for *_, weight in segments))
        self.widest = max(r1 - r0 for _, _, r0, r1, _ in segments)
        # Several adapters on the same rows go one after the other: their threads would write to the same outputs.
        apart: list[list[int]] = []
        for index, (t0, t1, *_) in enumerate(segments):
            layer = next(
                (known for known in apart if all(t1 <= segments[i][0] or t0 >= segments[i][1] for i in known)), None
            )
            if layer is None:
                apart.append([index])
            else:
                layer.append(index)
        self.layers = []
        for layer in apart:
            pieces = [(i, t) for i in layer for t in range(segments[i][0], segments[i][1], SPAN_ROWS)]
            self.layers.append(_Layer(_array([i for i, _ in pieces]), _array([t for _, t in pieces]), len(pieces)))


@functools.cache
def load(dtype: torch.dtype) -> Native | None:
    """The kernels for `dtype`, compiled when they are not in the user's cache yet (about 2 s); None where they
    cannot be had."""
    if dtype not in _TYPES:
        return None
    library = _library()
    return Native(library, dtype) if library is not None else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    return build("kernels_both.c", ("kernels.c",), _FLAGS)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


_i64 = ctypes.c_int64


def _array(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _sums(counts: Iterable[int]) -> list[int]:
    total, sums = 0, [0]
    for count in counts:
        total += count
        sums.append(total)
    return sums
