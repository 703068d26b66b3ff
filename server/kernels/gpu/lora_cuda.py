"""The LoRA kernels of lora_rows.cu: how a decode step's work is cut up, and their launches."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.gpu import cuda
from server.kernels.gpu.launch import dependent, processors

WARPS = 4
THREADS = 32 * WARPS
STEP = 128 * WARPS  # inputs that a group of threads takes at a time


@dataclass(frozen=True)
class Cut:
    """How work is cut: what a launch is compiled for, as named in lora_rows.cu, and the groups it starts.

    shrink_groups, expand_groups: thread groups that are to fit a processor; as many are started, times `turns`.
    """

    blocks: int = 2
    shrink_groups: int = 6
    expand_groups: int = 4
    turns: int = 1
    early: bool = True  # whether a launch may begin while the one in front of it runs, where the device can

    @property
    def columns(self) -> int:
        """Of a tile of the expand."""
        return 64 * self.blocks


def fits(*given: Tensor) -> bool:
    """Whether the kernels take these rows; their sites must be `aligned`."""
    rows = all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in given)
    kind = all(t.dtype in (torch.bfloat16, torch.float16) and t.is_cuda for t in given)
    return rows and kind and cuda.available()


def shrink(
    x: Tensor, plan: Tensor, pieces_at: int, pieces: int, table: Tensor, h: Tensor, splits: int, share: int, cut: Cut
) -> None:
    """h of every piece; table: the sites' addresses of A; share: inputs of one of the splits."""
    sites, (_, width) = table.shape[0], x.shape
    most = pieces * sites * splits
    kernel = _function(shrink_constants(x.dtype, sites, splits, share, width, cut), x.device)
    groups = min(most, processors(x.device) * cut.shrink_groups * cut.turns)
    kernel((groups, 1), THREADS, x, x.stride(0), plan, pieces_at, table, h, early=cut.early and dependent(x.device))


def expand(
    y: Tensor, plan: Tensor, pieces_at: int, groups: int, tiles: Tensor, h: Tensor, sites: int, splits: int, cut: Cut
) -> None:
    """y of every group; tiles: of `cut.columns` columns."""
    kernel = _function(expand_constants(y.dtype, sites, splits, cut), y.device)
    most = -(-groups * tiles.shape[0] // WARPS)
    started = min(most, processors(y.device) * cut.expand_groups * cut.turns)
    early = cut.early and dependent(y.device)
    kernel((started, 1), THREADS, y, y.stride(0), plan, pieces_at, tiles, tiles.shape[0], h, early=early)


def shrink_constants(
    dtype: torch.dtype, sites: int, splits: int, share: int, width: int, cut: Cut
) -> tuple[tuple[str, int], ...]:
    """What the shrink is compiled with."""
    return (
        ("EXPAND", 0),
        ("WARPS", WARPS),
        ("HALF", int(dtype == torch.float16)),
        ("SITES", sites),
        ("SPLITS", splits),
        ("STEPS", share // STEP),
        ("WIDTH", width),
        ("GROUPS", cut.shrink_groups),
    )


def expand_constants(dtype: torch.dtype, sites: int, splits: int, cut: Cut) -> tuple[tuple[str, int], ...]:
    """What the expand is compiled with."""
    return (
        ("EXPAND", 1),
        ("WARPS", WARPS),
        ("HALF", int(dtype == torch.float16)),
        ("SITES", sites),
        ("SPLITS", splits),
        ("BLOCKS", cut.blocks),
        ("GROUPS", cut.expand_groups),
    )


@functools.cache
def _function(constants: tuple[tuple[str, int], ...], device: torch.device) -> cuda.Function:
    return cuda.Function("lora_rows", constants, 0, device)
