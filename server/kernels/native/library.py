"""The one compiled library of this folder."""

from __future__ import annotations

import ctypes
import functools

import torch

from server.kernels.native.build import build

# No -ffast-math: it would let the compiler assume that nothing is NaN, and NaN is how a bad row is found.
_FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros")
_INCLUDED = ("common.h", "gemm.c", "ops.c", "decoder.c", "loading.c")

TYPES = {torch.bfloat16: "bf16", torch.float32: "f32"}
"""The element types it is compiled for, and their names in it."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Compiled when it is not in the user's cache yet (about 5 s); None where it cannot be had."""
    native = build("native.c", _INCLUDED, _FLAGS)
    if native is not None:
        native.tiles_request()
    return native
