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


class _Overlap:
    allowed = True  # on an H200: right, and steps of an 8B model 4 to 11 % shorter


def overlap(allowed: bool) -> bool:
    """Whether kernels may start before the one in front of them ends, where the device can; returns what held before.

    Holds for launches from here on, not for graphs already captured.
    """
    before, _Overlap.allowed = _Overlap.allowed, allowed
    return before


def dependent(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it in its stream ends (programmatic dependent launch)."""
    return _Overlap.allowed and _can_overlap(device)


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def early_start(device: torch.device, wanted: bool = True) -> dict[str, bool]:
    """Launch arguments for a kernel that takes `DEPENDENT`: all of its programs call `wait_for_writes` if that is set.

    The wait is for all that was launched before, not only for the kernel in front: that one has waited itself.
    """
    return {"DEPENDENT": True, "launch_pdl": True} if wanted and dependent(device) else {"DEPENDENT": False}


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
