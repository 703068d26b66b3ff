"""Low-rank deltas of many adapters at once: shrink every token by its own rows of A, expand by those of B.

    h[t, r] = x[t] . a[r]                      for the rows r of every adapter of token t        (shrink)
    y[t]   += sum over them of weight * h[t, r] * b[r]                                          (expand)

Linears that share their input (q, k, v; gate, up) go through one launch of each. The kernels are persistent: a fixed
number of programs walks the units of work that the plan counts, so a step without adapters costs two launches that
find nothing to do, and a captured graph fits every step. Those of decode steps are in `lora_decode`; here are those
of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gpu import lora_cuda
from server.kernels.gpu.launch import early_start, multiply, precision, processors
from server.kernels.gpu.lora_decode import expand_rows, shrink_rows
from server.kernels.gpu.lora_plan import GROUP, HEADER, PIECE, RANKS, LoraPlan

_HEADER = tl.constexpr(HEADER)
_GROUP = tl.constexpr(GROUP)
_PIECE = tl.constexpr(PIECE)

_LARGEST_DECODE = 16  # tokens of a group that the decode step's kernels take
MOST_SPLITS = 16  # of the input in a decode step
_PROMPT_COLUMNS = 128  # output columns of a unit of the prompts' expand


@dataclass(frozen=True)
class Tiling:
    """How the decode step's work is cut, but for the input (see `splits`): the tiles and the programs a processor."""

    columns: int = 512  # output columns of a unit of the expand
    warps: int = 4  # of the expand
    registers: int = 96  # a thread of the expand may take
    expand_programs: int = 5
    shrink_programs: int = 7
    early: bool = True  # whether a launch may begin while the one in front still runs, where the device can


_TILING = Tiling()
_CUT = lora_cuda.Cut()
# Whether a decode step launches what needs no y before the product that y comes from. What it gains is not known yet.
SHRINK_FIRST = False


class LoraSites:
    """The arena matrices of linears that share their input, by address, as the kernels want them.

    a[i]: [rows, in] and b[i]: [rows, out_i], contiguous, one dtype, at least 16-byte aligned. Their outputs lie side
    by side in one y [T, sum of out].
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
        self._alive = (*a, *b)
        one = {(t.dtype, t.device) for t in self._alive}
        if len(one) != 1 or len({t.shape[1] for t in a}) != 1 or len(a) != len(b):
            raise ValueError("sites that share an input have one width, one dtype and one device")
        if any(not t.is_contiguous() or t.data_ptr() % 16 for t in self._alive):
            raise ValueError("arena matrices are contiguous and 16-byte aligned")
        self.dtype, device = a[0].dtype, a[0].device
        self.count = len(a)
        self.width = a[0].shape[1]
        self.out = [t.shape[1] for t in b]
        # Kernels may assume 16-byte rows only where all rows are.
        self.aligned = all(t.shape[1] * t.element_size() % 16 == 0 for t in self._alive)
        self.a = torch.tensor([t.data_ptr() for t in a], dtype=torch.int64, device=device)
        self._b = [t.data_ptr() for t in b]
        self._tiles: dict[int, Tensor] = {}

    def tiles(self, columns: int) -> Tensor:
        """[tiles, 4] int64, for every tile of up to `columns` output columns of a site: the address of its first
        column of b, the row's width, the columns from there to the row's end, and the site << 32 | its column of y."""
        known = self._tiles.get(columns)
        if known is None:
            rows, at, size = [], 0, self.dtype.itemsize
            for site, width in enumerate(self.out):
                for n0 in range(0, width, columns):
                    rows.append((self._b[site] + n0 * size, width, width - n0, site << 32 | at + n0))
                at += width
            known = self._tiles[columns] = torch.tensor(rows, dtype=torch.int64, device=self.a.device)
        return known


def splits(tokens: int, width: int) -> int:
    """Into how many parts the shrink cuts its input of `width`.

    It depends on the layer alone, never on the batch: the same sums in the same order, whatever the company.
    """
    return 1 if tokens > _LARGEST_DECODE else -(-width // _share(width))


def _share(width: int) -> int:
    """Inputs of one part in a decode step: 16 KiB of an adapter's numbers, or more where the parts would be many."""
    share = 512
    while share * MOST_SPLITS < width:
        share *= 2
    return share


def scratch_elements(plan: LoraPlan, sites: LoraSites) -> int:
    """How many numbers `lora_add` needs for h."""
    return plan.pieces * sites.count * splits(plan.tokens, sites.width) * plan.tokens * RANKS


def scratch(plan: LoraPlan, sites: LoraSites) -> Tensor:
    """The memory `lora_add` needs for h: [pieces, sites, splits, tokens, RANKS] float32; may be shared by layers."""
    shape = (plan.pieces, sites.count, splits(plan.tokens, sites.width), plan.tokens, RANKS)
    return torch.empty(shape, dtype=torch.float32, device=plan.buffer.device)


def lora_add(
    y: Tensor,
    x: Tensor,
    sites: LoraSites,
    plan: LoraPlan,
    h: Tensor | None = None,
    programs: int | None = None,
    tiling: Tiling | lora_cuda.Cut | None = None,
) -> None:
    """`reference.lora_add` in place, for all sites: y [T, sum of out], x [T, in], both with contiguous rows.

    `h` is memory from `scratch` for this plan and the largest sites that share it (allocated here when None; a
    captured graph brings its own). `programs`: of each kernel, for tests.
    """
    if y.dtype != sites.dtype or y.shape[1] != sum(sites.out) or y.stride(1) != 1:
        raise ValueError(f"y of {y.shape[1]} {y.dtype} does not fit the sites")
    h = _room(x, sites, plan, h)
    if plan.tokens > _LARGEST_DECODE:
        _add_prompts(y, x, sites, plan, h, programs)
        return
    if tiling is None:
        tiling = _CUT if sites.aligned and plan.tokens == 8 and lora_cuda.fits(x, y) else _TILING
    _shrink_rows(x, sites, plan, h, programs, tiling)
    _expand_rows(y, sites, plan, h, programs, tiling)


def lora_begin(x: Tensor, sites: LoraSites, plan: LoraPlan, h: Tensor | None = None) -> Callable[[Tensor], None]:
    """`lora_add` of one x, in two halves: launches what needs no y where `SHRINK_FIRST` says so, and returns what
    launches the rest, for a y that is contiguous. Until then `h` is this call's."""
    if not SHRINK_FIRST or plan.tokens > _LARGEST_DECODE:
        return lambda y: lora_add(y, x, sites, plan, h)
    h = _room(x, sites, plan, h)
    tiling = _CUT if sites.aligned and plan.tokens == 8 and lora_cuda.fits(x) else _TILING
    _shrink_rows(x, sites, plan, h, None, tiling)
    return lambda y: _expand_rows(y, sites, plan, h, None, tiling)


def _room(x: Tensor, sites: LoraSites, plan: LoraPlan, h: Tensor | None) -> Tensor:
    """Memory for h, given or new; raises ValueError where x or the given memory does not fit."""
    if x.dtype != sites.dtype or x.shape[1] != sites.width or x.stride(1) != 1:
        raise ValueError(f"x of {x.shape[1]} {x.dtype} does not fit the sites, of {sites.width} {sites.dtype}")
    if h is None:
        return scratch(plan, sites)
    if h.numel() < scratch_elements(plan, sites):
        raise ValueError("the scratch memory is too small for these sites")
    return h


def _shrink_rows(
    x: Tensor, sites: LoraSites, plan: LoraPlan, h: Tensor, programs: int | None, tiling: Tiling | lora_cuda.Cut
) -> None:
    parts, share, here = splits(plan.tokens, sites.width), _share(sites.width), processors(x.device)
    if isinstance(tiling, lora_cuda.Cut):
        lora_cuda.shrink(x, plan.buffer, plan.piece_at, plan.pieces, sites.a, h, parts, share, tiling)
        return
    warps = 4 if share <= 512 else 8
    shrink_rows[(programs or min(tiling.shrink_programs * here, plan.pieces * sites.count * parts),)](
        x,
        plan.buffer,
        sites.a,
        h,
        x.stride(0),
        PIECES_AT=plan.piece_at,
        SITES=sites.count,
        SPLITS=parts,
        WIDTH=sites.width,
        SHARE=share,
        WARPS=warps,
        TOKENS=plan.tokens,
        RANKS=RANKS,
        ALIGNED=sites.aligned,
        PRECISION=precision(x),
        num_warps=warps,
        num_stages=1,  # a pipelined load would not wait where the kernel says so
        **early_start(x.device, tiling.early),
    )


def _expand_rows(
    y: Tensor, sites: LoraSites, plan: LoraPlan, h: Tensor, programs: int | None, tiling: Tiling | lora_cuda.Cut
) -> None:
    tiles, parts, here = sites.tiles(tiling.columns), splits(plan.tokens, sites.width), processors(y.device)
    if isinstance(tiling, lora_cuda.Cut):
        lora_cuda.expand(y, plan.buffer, plan.piece_at, plan.groups, tiles, h, sites.count, parts, tiling)
        return
    expand_rows[(programs or min(tiling.expand_programs * here, plan.groups * tiles.shape[0]),)](
        y,
        plan.buffer,
        tiles,
        h,
        y.stride(0),
        PIECES_AT=plan.piece_at,
        SITES=sites.count,
        SPLITS=parts,
        TILES=tiles.shape[0],
        TOKENS=plan.tokens,
        RANKS=RANKS,
        COLUMNS=tiling.columns,
        ALIGNED=sites.aligned,
        PRECISION=precision(y),
        num_warps=tiling.warps,
        num_stages=1,
        maxnreg=tiling.registers,
        **early_start(y.device, tiling.early),
    )


def _add_prompts(y: Tensor, x: Tensor, sites: LoraSites, plan: LoraPlan, h: Tensor, programs: int | None) -> None:
    tiles, here = sites.tiles(_PROMPT_COLUMNS), processors(x.device)
    _shrink[(programs or 4 * here,)](
        x,
        plan.buffer,
        sites.a,
        h,
        x.stride(0),
        PIECES_AT=plan.piece_at,
        SITES=sites.count,
        WIDTH=sites.width,
        TOKENS=plan.tokens,
        RANKS=RANKS,
        STEP=128 if plan.tokens <= 64 else 64,
        ALIGNED=sites.aligned,
        PRECISION=precision(x),
        num_warps=4,
        num_stages=4,
    )
    _expand[(programs or 8 * here,)](
        y,
        plan.buffer,
        h,
        tiles,
        y.stride(0),
        PIECES_AT=plan.piece_at,
        SITES=sites.count,
        TILES=tiles.shape[0],
        TOKENS=plan.tokens,
        RANKS=RANKS,
        COLUMNS=_PROMPT_COLUMNS,
        ALIGNED=sites.aligned,
        PRECISION=precision(x),
        num_warps=4,
        num_stages=2,
    )


@triton.jit
def _shrink(
    x,
    plan,
    table,
    h,
    x_stride,
    PIECES_AT: tl.constexpr,
    SITES: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h[piece, site] = x[tokens] . a[rows]; a unit is one (piece, site).

    Sites of a piece are neighbours, so their programs read the same x at the same time.
    """
    EVEN: tl.constexpr = WIDTH % STEP == 0
    units = tl.load(plan + 1) * SITES
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        site = unit % SITES
        piece = unit // SITES
        here = plan + PIECES_AT + piece * _PIECE
        t0, tokens, r0, ranks = tl.load(here), tl.load(here + 1), tl.load(here + 2), tl.load(here + 3)
        a = tl.load(table + site).to(tl.pointer_type(x.dtype.element_ty))
        if ALIGNED:
            a = tl.multiple_of(a, 16)
        t = tl.arange(0, TOKENS)
        r = tl.arange(0, RANKS)
        x_rows = x + (t0 + t).to(tl.int64)[:, None] * x_stride
        a_rows = a + (r0 + r).to(tl.int64)[None, :] * WIDTH
        t_seen = (t < tokens)[:, None]
        r_seen = (r < ranks)[None, :]
        total = tl.zeros([TOKENS, RANKS], dtype=tl.float32)
        for step in range(0, WIDTH, STEP):
            k = step + tl.arange(0, STEP)
            if EVEN:
                x_tile = tl.load(x_rows + k[None, :], mask=t_seen, other=0.0)
                a_tile = tl.load(a_rows + k[:, None], mask=r_seen, other=0.0)
            else:
                x_tile = tl.load(x_rows + k[None, :], mask=t_seen & (k < WIDTH)[None, :], other=0.0)
                a_tile = tl.load(a_rows + k[:, None], mask=r_seen & (k < WIDTH)[:, None], other=0.0)
            total = multiply(x_tile, a_tile, total, PRECISION)
        out = h + ((piece * SITES + site).to(tl.int64) * TOKENS + t)[:, None] * RANKS + r[None, :]
        tl.store(out, total, mask=t_seen & r_seen)


@triton.jit
def _expand(
    y,
    plan,
    h,
    tiles,
    y_stride,
    PIECES_AT: tl.constexpr,
    SITES: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y[tokens, columns] += sum over the group's pieces; a unit is one (group, tile of columns).

    One program does all pieces of its tokens, so y is read and rounded once and nobody else writes there.
    """
    units = tl.load(plan) * TILES
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        tile = tiles + unit % TILES * 4
        group = plan + _HEADER + unit // TILES * _GROUP
        t0, tokens = tl.load(group), tl.load(group + 1)
        b = tl.load(tile).to(tl.pointer_type(y.dtype.element_ty))
        width, left = tl.load(tile + 1), tl.load(tile + 2)
        where = tl.load(tile + 3)
        site, y0 = (where >> 32).to(tl.int32), (where & 0xFFFFFFFF).to(tl.int32)
        if ALIGNED:
            b, width = tl.multiple_of(b, 16), tl.multiple_of(width, 8)
            left, y0 = tl.multiple_of(left, 8), tl.multiple_of(y0, 8)
        t = tl.arange(0, TOKENS)
        r = tl.arange(0, RANKS)
        n = tl.arange(0, COLUMNS)
        t_seen = (t < tokens)[:, None]
        n_seen = (n < left)[None, :]
        total = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
        for piece in range(tl.load(group + 2), tl.load(group + 3)):
            here = plan + PIECES_AT + piece * _PIECE
            r0, ranks = tl.load(here + 2), tl.load(here + 3)
            weight = tl.load(here + 4).to(tl.float32, bitcast=True)
            r_seen = r < ranks
            part = h + ((piece * SITES + site).to(tl.int64) * TOKENS + t)[:, None] * RANKS + r[None, :]
            low = tl.load(part, mask=t_seen & r_seen[None, :], other=0.0)
            b_tile = tl.load(
                b + (r0 + r).to(tl.int64)[:, None] * width + n[None, :],
                mask=r_seen[:, None] & n_seen,
                other=0.0,
            )
            total = multiply((low * weight).to(b_tile.dtype), b_tile, total, PRECISION)
        out = y + (t0 + t).to(tl.int64)[:, None] * y_stride + (y0 + n)[None, :]
        seen = t_seen & n_seen
        base = tl.load(out, mask=seen, other=0.0).to(tl.float32)
        tl.store(out, (base + total).to(y.dtype.element_ty), mask=seen)
