"""What the launches have in common: how many programs, how large a tile, how exact a product of two tiles."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; 1 where Triton's interpreter stands in for it."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def precision(operand: Tensor) -> str:
    """How `multiply` multiplies tiles of the operand's dtype.

    "exact": float32 means float32, not Triton's default of 10-bit mantissas. "native": what the tensor cores do with
    16-bit numbers. "widened": Triton's interpreter would multiply the bits of bfloat16 as if they were integers.
    """
    if operand.device.type == "cpu":
        return "widened"
    return "exact" if operand.dtype == torch.float32 else "native"


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`, at least 16: the smallest side of a tile that `tl.dot` takes."""
    return max(16, 1 << (size - 1).bit_length())


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a b, summed in float32; see `precision`."""
    if PRECISION == "native":
        total = tl.dot(a, b, total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return total
