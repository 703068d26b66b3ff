"""What the launches have in common: how many programs, how large a tile, how exact a product of two tiles."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; 1 where Triton's interpreter stands in for it."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def dependent(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it in its stream ends (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Launch options for kernels that start early: those whose every program calls `wait_for_writes`."""
    return {"launch_pdl": True} if dependent(device) else {}


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


@triton.jit
def launch_dependents(DEPENDENT: tl.constexpr):
    """The next kernel may take what room this one leaves, as soon as all of this one's programs have started."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait_for_writes(DEPENDENT: tl.constexpr):
    """Until all that was launched before has ended and is seen; before it, read only what no kernel writes.

    Nothing may be written before it either: an earlier kernel may still read there.
    """
    if DEPENDENT:
        gdc_wait()
