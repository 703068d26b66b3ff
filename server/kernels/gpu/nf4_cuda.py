"""The NF4 product of nf4_product.cu: how it is cut up for a card, and its launch.

A group of threads stands on a slice of the inputs: it keeps the slice of x in shared memory and walks tiles of
outputs, its warps sharing the slice. Where there are several slices, the last group of a tile joins their sums.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from server.kernels.gpu import cuda
from server.kernels.gpu.launch import dependent, processors
from server.kernels.gpu.nf4_levels import LEVELS

_TABLE = (1 << 16) + 256  # bytes of shared memory: entries of 256, of which half is used, and a byte a tile
MOST_ALONE = 16  # rows for warps that multiply by themselves; beyond it, on an H200, Triton's kernel was as fast
LEAST_FOURS = 9  # rows from which fours of warps, where the card has them, are faster
MOST_ROWS = 64  # for fours of warps
_MOST = 256  # tiles that one group walks
_COMPILERS = 8  # threads at most
_RESERVED = 1024  # bytes of every group's shared memory, by the driver


@dataclass(frozen=True)
class Cut:
    """Constants of nf4_product.cu, named there. rows: a power of two, outputs: a multiple of `tile`.

    wgmma: warps multiply by fours, which takes at least 8 rows and compute capability 9.0. apart: the sharers have
    tiles of their own. by_registers: of warps that multiply by themselves. ahead: how often a group walks on for codes
    that it asks for early. No card has shown yet what these two gain.
    """

    rows: int
    outputs: int
    blocks: int
    steps: int = 1
    warps: int = 16
    together: int = 4  # tiles of 8 rows whose sums are joined at a time
    wgmma: bool = False
    apart: bool = False
    by_registers: bool = False
    ahead: int = 0

    @property
    def tile(self) -> int:
        """Outputs that a warp, or four, have in one multiplication."""
        return 64 if self.wgmma else 16

    @property
    def sharers(self) -> int:
        """Of a group: warps, or fours of them."""
        return self.warps // 4 if self.wgmma else self.warps

    @property
    def walk(self) -> int:
        """Tiles that a group has at a time."""
        return self.sharers if self.apart else 1

    @property
    def inputs(self) -> int:
        """Of a slice."""
        return (1 if self.apart else self.sharers) * self.blocks * self.steps * 64

    @property
    def passes(self) -> int:
        """Tiles of rows at a time."""
        return min(self.together, -(-self.rows // 8))

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a launch asks for: the table, x, the sharers' sums."""
        x = self.inputs // 32 * (self.rows * 64 + 64) if self.wgmma else self.rows * (self.inputs + 32) * 2
        sums = 0 if self.apart else self.sharers * 8 * self.passes * (self.outputs + 4) * 4
        return _TABLE + x + sums

    @property
    def registers(self) -> int:
        """Of a thread, for sums, codes, scales and what it multiplies."""
        share = self.outputs // self.tile
        sums, codes = share * max(8, self.rows) // 2, share * 4 * self.blocks
        if self.wgmma:
            return sums + codes + 8 * share + 16
        return sums + codes + max(8, self.rows) // 2

    @property
    def under_way(self) -> int:
        """Bytes of codes that a group has asked for and not yet got."""
        return self.warps * 32 * 16 * (self.outputs // self.tile) * self.blocks

    def asking(self, size: int, out: int, width: int, count: int) -> Cut:
        """This one, asking for about `size` bytes of codes before the kernel in front of it has ended."""
        once = self.walkers(out, width, count) * self.walk * self.outputs * width // 2
        return replace(self, ahead=min(-(-size // once), -(-out * width // 2 // once)))

    def slices(self, width: int) -> int:
        """Of an input of `width`."""
        return -(-width // self.inputs)

    def tiles(self, out: int) -> int:
        """Of `out` outputs."""
        return -(-out // self.outputs)

    def walkers(self, out: int, width: int, count: int) -> int:
        """Groups of each slice on a card of `count` processors."""
        return min(-(-self.tiles(out) // self.walk), max(1, count // self.slices(width)))

    def parts(self, out: int, width: int) -> int:
        """Numbers that groups leave each other."""
        slices = self.slices(width)
        return self.tiles(out) * slices * self.rows * self.outputs if slices > 1 else 0

    def cycles(self, out: int, width: int, count: int) -> float:
        """What it takes about, on a card of `count` processors; by this, cuts are compared that nobody has timed.

        Fitted to 320 cuts of an 8B model's products on an H200, from which it is off by 5 % in the mean: a launch and
        its beginning, x on its way to shared memory, weights, the sharers' sums, the slices' parts.
        """
        slices, rows = self.slices(width), max(8, self.rows)
        rounds = -(-self.tiles(out) // (self.walkers(out, width, count) * self.walk))
        x = self.rows * self.inputs * 2
        if self.wgmma:
            cycles = 6630 + 0.015 * x
            weight = (0.028 if self.warps == 16 else 0.048) + 0.00034 * rows
        else:
            cycles = 7270 + 0.137 * x
            weight = 0.0315 + (0.0017 if self.warps == 8 else 0.0) + 0.0009 * (rows - 8)
        cycles += rounds * self.walk * self.outputs * self.inputs * (weight + 90 / self.under_way)
        if not self.apart:
            cycles += rounds * 0.1 * self.sharers * rows * self.outputs
        if slices > 1:
            cycles += 600 + rounds * self.walk * self.outputs * self.rows * (0.88 + 0.017 * slices)
        return cycles


def cuts(rows: int, width: int, limit: int, wgmma: bool = False) -> list[Cut]:
    """All that `rows` of x could be multiplied by within `limit` bytes of shared memory a processor."""
    found = []
    tiles = (64, 128) if wgmma else (16, 32, 48, 64)
    ways = itertools.product(tiles, (2, 4), range(1, 33), (8, 16), (1, 2, 4), (False, True))
    for outputs, blocks, slices, warps, together, apart in ways:
        each = -(-width // 64 // slices)  # blocks of a slice
        cut = Cut(rows, outputs, blocks, 1, warps, together, wgmma=wgmma, apart=apart)
        cut = replace(cut, steps=-(-each // (blocks * (1 if apart else cut.sharers))))
        fits = cut.shared + _RESERVED <= limit and cut.registers <= (84 if warps == 16 else 180)
        joined_as_asked = together == 1 if apart else together <= -(-rows // 8)
        if joined_as_asked and fits and cut not in found:
            found.append(cut)
    return found


@functools.cache
def best(rows: int, out: int, width: int, count: int, limit: int, wgmma: bool = False) -> Cut | None:
    """The cut for a product on a card of `count` processors with `limit` bytes of shared memory each: the fastest of
    those that were timed on such a card, else the one that should be; None where none fits."""
    for known in _timed(count, limit):
        if known[:2] == (out, width) and known[2].rows >= rows and (wgmma or not known[2].wgmma):
            return replace(known[2], rows=rows)
    return min(cuts(rows, width, limit, wgmma), key=lambda cut: cut.cycles(out, width, count), default=None)


@functools.cache
def _timed(count: int, limit: int) -> list[tuple[int, int, Cut]]:
    """(out, width, cut) of nf4_cuts.json for such a card, those for the fewest rows first."""
    cards = json.loads((Path(__file__).parent / "nf4_cuts.json").read_text(encoding="utf-8"))["cards"]
    rows = [row for card in cards if (card["processors"], card["shared"]) == (count, limit) for row in card["cuts"]]
    found = [(row.pop("out"), row.pop("width"), Cut(**row)) for row in rows]
    return sorted(found, key=lambda known: known[2].rows)


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
    odd = x.stride(0) % 8 or x.data_ptr() % 16 or codes.data_ptr() % 16
    if odd or not _narrow(x.dtype, scales.dtype) or not cuda.available():
        return None
    count = processors(x.device)
    cut = given or cut_for(rows, out, width, x.device)
    if cut is None or cut.parts(out, width) > parts.numel() or cut.tiles(out) > counters.numel():
        return None
    walkers = cut.walkers(out, width, count)
    if -(-cut.tiles(out) // (cut.walk * walkers)) * cut.walk > _MOST:
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


def cut_for(rows: int, out: int, width: int, device: torch.device) -> Cut | None:
    """How a product of so many rows is cut on this card; None where another kernel is faster, or there is no room."""
    wgmma = rows >= LEAST_FOURS and has_fours(device)
    if rows > (MOST_ROWS if wgmma else MOST_ALONE):
        return None
    return best(_rounded(rows), out, width, processors(device), _shared_limit(device), wgmma)


def prepare(weights: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    """Compile, several at a time, what `product` takes for any number of rows of `dtype` with these codes and scales,
    so that no first launch waits for it."""
    wanted: set[tuple[Cut, int, bool, bool, torch.device]] = set()
    for codes, scales in weights:
        if not cuda.available() or not _narrow(dtype, scales.dtype):
            continue
        out, width = codes.shape[0], 2 * codes.shape[1]
        for power in range(MOST_ROWS.bit_length()):
            cut = cut_for(1 << power, out, width, codes.device)
            if cut is not None:
                wanted.add((cut, width, dtype == torch.float16, scales.dtype == torch.float32, codes.device))
    with ThreadPoolExecutor(_COMPILERS, thread_name_prefix="loraplex-compile") as pool:
        for done in [pool.submit(_function, *one) for one in wanted]:
            done.result()


def _narrow(dtype: torch.dtype, scales: torch.dtype) -> bool:
    """Whether the kernel takes rows of `dtype` with such scales."""
    return dtype == torch.bfloat16 or (dtype == torch.float16 and scales == torch.float16)


def constants(cut: Cut, width: int, half: bool, wide: bool) -> tuple[tuple[str, int], ...]:
    """What nf4_product.cu is compiled with."""
    return (
        ("WIDTH", width),
        ("ROWS", cut.rows),
        ("WARPS", cut.warps),
        ("MT", cut.outputs // cut.tile),
        ("KB", cut.blocks),
        ("STEPS", cut.steps),
        ("NP", cut.passes),
        ("WGMMA", int(cut.wgmma)),
        ("APART", int(cut.apart)),
        ("BY_REGISTERS", int(cut.by_registers)),
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
def has_fours(device: torch.device) -> bool:
    """Whether four warps can multiply together."""
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _shared_limit(device: torch.device) -> int:
    """Bytes of shared memory of one processor."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


@functools.cache
def _function(cut: Cut, width: int, half: bool, wide: bool, device: torch.device) -> cuda.Function:
    return cuda.Function("nf4_product", constants(cut, width, half, wide), cut.shared, device)


def prepared(cut: Cut, width: int, device: torch.device) -> None:
    """Compiled for bfloat16 rows and float16 scales, so that its first launch waits for nothing; from any thread."""
    _function(cut, width, False, False, device)
