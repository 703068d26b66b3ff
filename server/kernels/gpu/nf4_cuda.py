"""The NF4 product of nf4_product.cu: how it is cut up for a card, and its launch.

A group of 256 threads stands on a slice of the inputs: it keeps the slice of x in shared memory and walks tiles of
outputs, its 8 warps sharing the slice. Where there are several slices, the last group of a tile joins their sums.

What bounds it, by a processor's clock: 18.6 bytes of memory on an H200, and 128 bytes of shared memory, of which a
look-up takes 128 for the 64 weights that 32 lanes get of it.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.gpu import cuda
from server.kernels.gpu.launch import processors
from server.kernels.gpu.nf4_levels import LEVELS

THREADS = 256
WARPS = 8
_TABLE = 256 * 32 * 4 + 256  # bytes of static shared memory
_MOST = 256  # tiles that one group walks
_RESERVED = 1024  # of every group, by the driver


@dataclass(frozen=True)
class Cut:
    """Constants of nf4_product.cu, named there. rows: a power of two, outputs: a multiple of 16."""

    rows: int
    outputs: int
    blocks: int
    steps: int = 1
    groups: int = 1

    @property
    def inputs(self) -> int:
        """Of a slice."""
        return WARPS * self.blocks * self.steps * 64

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory of a group: x, then the warps' sums."""
        joined = min(max(8, self.rows), 32)
        return self.rows * (self.inputs + 8) * 2 + WARPS * joined * (self.outputs + 4) * 4

    def slices(self, width: int) -> int:
        """Of an input of `width`."""
        return -(-width // self.inputs)

    def tiles(self, out: int) -> int:
        """Of `out` outputs."""
        return -(-out // self.outputs)

    def parts(self, out: int, width: int) -> int:
        """Numbers that groups leave each other."""
        slices = self.slices(width)
        return self.tiles(out) * slices * self.rows * self.outputs if slices > 1 else 0

    def cycles(self, out: int, width: int, count: int) -> float:
        """What it takes about, on a card of `count` processors; by this, cuts are compared."""
        slices, size, rows = self.slices(width), self.outputs * self.inputs, max(8, self.rows)
        walkers = max(1, count * self.groups // slices)
        rounds = -(-self.tiles(out) // walkers)
        under_way = self.groups * WARPS * self.outputs * self.blocks * 32  # bytes, of the 32 KiB that hide the latency
        memory = self.groups * size / 2 / 18.6 * max(1.0, 32768 / under_way)
        x = self.rows * self.inputs * 2
        shared = self.groups * (size / 64 + rows * self.inputs * 2 / 128 + rows * self.outputs * 0.75)
        joined = 4000 + rounds * self.groups * self.rows * self.outputs * 8 / 40 if slices > 1 else 0.0
        return 2500 + self.groups * x / 20 + rounds * (max(memory, shared) + 400) + joined


def cuts(rows: int, width: int, limit: int) -> list[Cut]:
    """All that `rows` of x could be multiplied by within `limit` bytes of shared memory a processor."""
    found = []
    for outputs, blocks, slices, groups in itertools.product((16, 32, 48, 64), (1, 2, 4), range(1, 17), (1, 2)):
        each = -(-width // 64 // slices)  # blocks of a slice
        cut = Cut(rows, outputs, blocks, -(-each // (WARPS * blocks)), groups)
        registers = outputs * max(8, rows) // 64 + outputs * blocks // 4 + max(8, rows)  # sums, codes, x
        fits = groups * (cut.shared + _TABLE + _RESERVED) <= limit
        if registers <= (40 if groups == 2 else 132) and fits and cut not in found:
            found.append(cut)
    return found


@functools.cache
def best(rows: int, out: int, width: int, count: int, limit: int) -> Cut | None:
    """The cut for a product on a card of `count` processors; None where none fits."""
    return min(cuts(rows, width, limit), key=lambda cut: cut.cycles(out, width, count), default=None)


def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    parts: Tensor,
    counters: Tensor,
    given: Cut | None = None,
) -> Tensor | None:
    """`nf4.matmul` of up to 64 rows; None where this kernel cannot do it: other types, odd addresses, no room."""
    rows, width = x.shape
    out = codes.shape[0]
    if x.dtype not in (torch.bfloat16, torch.float16) or x.stride(0) % 8 or x.data_ptr() % 16 or not cuda.available():
        return None
    cut = given or best(_rounded(rows), out, width, processors(x.device), _shared_limit(x.device))
    if cut is None or cut.parts(out, width) > parts.numel() or cut.tiles(out) > counters.numel():
        return None
    slices = cut.slices(width)
    walkers = min(cut.tiles(out), max(1, processors(x.device) * cut.groups // slices))
    if cut.tiles(out) > walkers * _MOST:
        return None
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    even = width // 64 % cut.blocks == 0 and scales.data_ptr() % 8 == 0
    kernel = _function(cut, x.dtype == torch.float16, scales.dtype == torch.float32, even, x.device)
    kernel(
        (walkers, slices),
        THREADS,
        x, cuda.Wide(x.stride(0)), codes, scales, levels(x.device, x.dtype), bias, y, parts, counters, rows, out, width,
    )  # fmt: skip
    return y


def constants(cut: Cut, half: bool, wide: bool, even: bool) -> tuple[tuple[str, int], ...]:
    """What nf4_product.cu is compiled with."""
    return (
        ("ROWS", cut.rows),
        ("MT", cut.outputs // 16),
        ("KB", cut.blocks),
        ("STEPS", cut.steps),
        ("HALF", int(half)),
        ("WIDE", int(wide)),
        ("EVEN", int(even)),
        ("GROUPS", cut.groups),
    )


def _rounded(rows: int) -> int:
    """So that few sizes of batch differ in how they are cut."""
    return 1 << (rows - 1).bit_length()


@functools.cache
def levels(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The sixteen levels on a device."""
    return torch.tensor(LEVELS).to(dtype).to(device)


@functools.cache
def _shared_limit(device: torch.device) -> int:
    """Bytes of shared memory of one processor."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


@functools.cache
def _function(cut: Cut, half: bool, wide: bool, even: bool, device: torch.device) -> cuda.Function:
    return cuda.Function("nf4_product", constants(cut, half, wide, even), cut.shared, device)
