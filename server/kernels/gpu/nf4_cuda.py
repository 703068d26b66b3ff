"""The NF4 product of nf4_product.cu: how it is cut up for a card, and its launch.

A group of threads stands on a slice of the inputs: it keeps the slice of x in shared memory and walks tiles of
outputs, its warps sharing the slice. Where there are several slices, the last group of a tile joins their sums.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.gpu import cuda
from server.kernels.gpu.launch import dependent, processors
from server.kernels.gpu.nf4_levels import LEVELS

_TABLE = 256 * 32 * 4 + 256  # bytes of static shared memory
MOST_ROWS = 16  # beyond it, on an H200, Triton's kernel was as fast or faster
AHEAD = 2  # tiles of a group whose codes are asked for while x is being made
_MOST = 256  # tiles that one group walks
STAGED = 0.136  # cycles a byte of x takes to shared memory; see `Cut.cycles`
_RESERVED = 1024  # bytes of every group's shared memory, by the driver


@dataclass(frozen=True)
class Cut:
    """Constants of nf4_product.cu, named there. rows: a power of two, outputs: a multiple of 16."""

    rows: int
    outputs: int
    blocks: int
    steps: int = 1
    warps: int = 16
    together: int = 4  # tiles of 8 rows whose sums are joined at a time
    ahead: int = AHEAD

    @property
    def inputs(self) -> int:
        """Of a slice."""
        return self.warps * self.blocks * self.steps * 64

    @property
    def passes(self) -> int:
        """Tiles of rows at a time."""
        return min(self.together, -(-self.rows // 8))

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory of a group: x, then the warps' sums."""
        return self.rows * (self.inputs + 32) * 2 + self.warps * 8 * self.passes * (self.outputs + 4) * 4

    def slices(self, width: int) -> int:
        """Of an input of `width`."""
        return -(-width // self.inputs)

    def tiles(self, out: int) -> int:
        """Of `out` outputs."""
        return -(-out // self.outputs)

    def walkers(self, out: int, width: int, count: int) -> int:
        """Groups of each slice on a card of `count` processors."""
        return min(self.tiles(out), max(1, count // self.slices(width)))

    def parts(self, out: int, width: int) -> int:
        """Numbers that groups leave each other."""
        slices = self.slices(width)
        return self.tiles(out) * slices * self.rows * self.outputs if slices > 1 else 0

    def cycles(self, out: int, width: int, count: int) -> float:
        """What it takes about, on a card of `count` processors; by this, cuts are compared.

        Fitted to 180 cuts of an 8B model's products on an H200, from which it is off by 5 % in the mean: a launch and
        its beginning, x on its way to shared memory, weights, the warps' sums, the slices' parts.
        """
        slices, rows = self.slices(width), max(8, self.rows)
        rounds = -(-self.tiles(out) // self.walkers(out, width, count))
        once = 7950 + STAGED * self.rows * self.inputs * 2 + (260 if slices > 1 else 0)
        size = self.outputs * self.inputs
        sums = 0.163 * self.warps * rows * self.outputs + 80 * (rows // 8) / self.passes
        joined = 0.02 * self.rows * self.outputs * slices if slices > 1 else 0.0
        return once + rounds * (0.039 * size + 0.0009 * size * rows + sums + joined)


def cuts(rows: int, width: int, limit: int) -> list[Cut]:
    """All that `rows` of x could be multiplied by within `limit` bytes of shared memory a processor."""
    found = []
    for outputs, blocks, slices, warps, together in itertools.product(
        (16, 32, 48, 64), (2, 4), range(1, 17), (8, 16), (1, 2, 4)
    ):
        each = -(-width // 64 // slices)  # blocks of a slice
        cut = Cut(rows, outputs, blocks, -(-each // (warps * blocks)), warps, together)
        registers = outputs * max(8, rows) // 64 + outputs * blocks // 4 + max(8, rows) // 2  # sums, codes, x
        fits = cut.shared + _TABLE + _RESERVED <= limit
        if together <= -(-rows // 8) and registers <= (84 if warps == 16 else 180) and fits and cut not in found:
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
    """`nf4.matmul` of few rows; None where another kernel is faster, or this one cannot do it: other types, odd
    addresses, no room."""
    rows, width = x.shape
    out = codes.shape[0]
    narrow = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and scales.dtype == torch.float16)
    if rows > MOST_ROWS and given is None:
        return None
    if not narrow or x.stride(0) % 8 or x.data_ptr() % 16 or codes.data_ptr() % 16 or not cuda.available():
        return None
    count = processors(x.device)
    cut = given or best(_rounded(rows), out, width, count, _shared_limit(x.device))
    if cut is None or cut.parts(out, width) > parts.numel() or cut.tiles(out) > counters.numel():
        return None
    walkers = cut.walkers(out, width, count)
    if cut.tiles(out) > walkers * _MOST:
        return None
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    kernel = _function(cut, width, x.dtype == torch.float16, scales.dtype == torch.float32, x.device)
    kernel(
        (walkers, cut.slices(width)),
        32 * cut.warps,
        x, cuda.Wide(x.stride(0)), codes, scales, levels(x.device, x.dtype), bias, y, parts, counters, rows, out,
        early=dependent(x.device),
    )  # fmt: skip
    return y


def constants(cut: Cut, width: int, half: bool, wide: bool) -> tuple[tuple[str, int], ...]:
    """What nf4_product.cu is compiled with."""
    return (
        ("WIDTH", width),
        ("ROWS", cut.rows),
        ("WARPS", cut.warps),
        ("MT", cut.outputs // 16),
        ("KB", cut.blocks),
        ("STEPS", cut.steps),
        ("NP", cut.passes),
        ("AHEAD", cut.ahead),
        ("HALF", int(half)),
        ("WIDE", int(wide)),
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
def _function(cut: Cut, width: int, half: bool, wide: bool, device: torch.device) -> cuda.Function:
    return cuda.Function("nf4_product", constants(cut, width, half, wide), cut.shared, device)
