"""The C structures of common.h and decoder.c."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

I64 = ctypes.c_int64
POINTER = ctypes.c_void_p


class Product(ctypes.Structure):
    """A packed weight and its bias."""

    _fields_ = [
        ("n", I64),
        ("k", I64),
        *((name, POINTER) for name in ("weight", "scales", "levels", "bias")),
    ]


class Site(ctypes.Structure):
    """The arena's matrices of one linear layer."""

    _fields_ = [("a", POINTER), ("b", POINTER), ("out", I64)]


class Joint(ctypes.Structure):
    """Up to three linear layers that share their input."""

    _fields_ = [("count", I64), ("products", Product * 3), ("sites", Site * 3)]


class Decode(ctypes.Structure):
    """LoRA of single rows."""

    _fields_ = [
        ("token_count", I64),
        ("items", I64),
        *((name, POINTER) for name in ("tokens", "first", "r0", "r1", "offset", "weight")),
    ]


class Prefill(ctypes.Structure):
    """LoRA of prompts."""

    _fields_ = [
        ("pieces", I64),
        ("widest", I64),
        *((name, POINTER) for name in ("piece_segment", "piece_start", "t1", "r0", "r1", "weight")),
    ]


class Affine(ctypes.Structure):
    """What an adapter does to one linear layer's outputs besides."""

    _fields_ = [("scale", POINTER), ("shift", POINTER)]


class AffineSpan(ctypes.Structure):
    """Rows, and their adapter's affines."""

    _fields_ = [("t0", I64), ("t1", I64), ("affines", POINTER), ("weight", ctypes.c_float)]


class Layer(ctypes.Structure):
    """A decoder layer."""

    _fields_ = [
        *((name, Joint) for name in ("qkv", "out", "gate_up", "down")),
        *(
            (name, POINTER)
            for name in ("before_attention", "q_norm", "k_norm", "after_attention", "before_mlp", "after_mlp", "k", "v")
        ),
        ("window", I64),
    ]


class Decoder(ctypes.Structure):
    """All decoder layers."""

    _fields_ = [
        ("layers", POINTER),
        *(
            (name, I64)
            for name in (
                *("hidden", "heads", "kv_heads", "width", "rotary", "inner", "slots", "page_tokens"),
                *("late_norm", "flat_norm"),
            )
        ),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class Batch(ctypes.Structure):
    """What one call of the decoder works on."""

    _fields_ = [
        ("rows", I64),
        *((name, POINTER) for name in ("x", "cos", "sin", "write")),
        *((name, I64) for name in ("count", "max_pages", "longest")),
        *((name, POINTER) for name in ("row", "sequence", "length", "pages", "decode", "prefill")),
        ("prefill_layers", I64),
        ("affine", POINTER),
        ("affine_spans", I64),
        *(
            (name, POINTER)
            for name in ("normed", "qkv", "q", "attended", "y", "gate_up", "inner", "wide", "h", "scores", "pieces")
        ),
    ]


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers are; NULL for None."""
    return POINTER(0 if tensor is None else tensor.data_ptr())


def address(array: ctypes.Array[Any]) -> int:
    """Where an array is; it must be kept alive by whoever stores this."""
    return ctypes.addressof(array)


def int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """An array of int64."""
    return (I64 * len(values))(*values)


def floats(values: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    """An array of float."""
    return (ctypes.c_float * len(values))(*values)


def sums(counts: Iterable[int]) -> list[int]:
    """0 and the running sums."""
    total, running = 0, [0]
    for count in counts:
        total += count
        running.append(total)
    return running
