"""Low-rank deltas of many adapters at once: shrink every token by its own rows of A, expand by those of B.

    h[t, r] = x[t] . a[r]                      for the rows r of every adapter of token t        (shrink)
    y[t]   += sum over them of weight * h[t, r] * b[r]                                          (expand)

Linears that share their input (q, k, v; gate, up) go through one launch of each. Both kernels are persistent: a fixed
number of programs walks the units of work that the plan counts, so a step without adapters costs two launches that
find nothing to do, and a captured graph fits every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gpu.launch import multiply, precision, processors
from server.kernels.gpu.lora_plan import GROUP, HEADER, PIECE, RANKS, LoraPlan

_HEADER = tl.constexpr(HEADER)
_GROUP = tl.constexpr(GROUP)
_PIECE = tl.constexpr(PIECE)

_COLUMNS = 256  # output columns of a unit of the expand
_PROMPT_COLUMNS = 128  # the same for large groups, whose sums take more registers


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
        self.b = torch.tensor([t.data_ptr() for t in b], dtype=torch.int64, device=device)
        self._tiles: dict[int, Tensor] = {}

    def tiles(self, columns: int) -> Tensor:
        """[tiles, 4] int32: every tile of up to `columns` output columns as (site, first column, width, y column)."""
        known = self._tiles.get(columns)
        if known is None:
            rows, at = [], 0
            for site, width in enumerate(self.out):
                rows += [(site, n0, width, at + n0) for n0 in range(0, width, columns)]
                at += width
            known = self._tiles[columns] = torch.tensor(rows, dtype=torch.int32, device=self.a.device)
        return known


def splits(tokens: int, width: int) -> int:
    """Into how many parts the shrink cuts its input of `width`.

    It depends on the layer alone, never on the batch: the same sums in the same order, whatever the company.
    """
    return 1 if tokens > 16 else max(1, min(8, width // 512))


def scratch_elements(plan: LoraPlan, sites: LoraSites) -> int:
    """How many numbers `lora_add` needs for h."""
    return plan.pieces * sites.count * splits(plan.tokens, sites.width) * plan.tokens * RANKS


def scratch(plan: LoraPlan, sites: LoraSites) -> Tensor:
    """The memory `lora_add` needs for h: [pieces, sites, splits, tokens, RANKS] float32; may be shared by layers."""
    shape = (plan.pieces, sites.count, splits(plan.tokens, sites.width), plan.tokens, RANKS)
    return torch.empty(shape, dtype=torch.float32, device=plan.buffer.device)


def lora_add(
    y: Tensor, x: Tensor, sites: LoraSites, plan: LoraPlan, h: Tensor | None = None, programs: int | None = None
) -> None:
    """`reference.lora_add` in place, for all sites: y [T, sum of out], x [T, in], both with contiguous rows.

    `h` is memory from `scratch` for this plan and the largest sites that share it (allocated here when None; a
    captured graph brings its own). `programs`: of each kernel, for tests.
    """
    if x.dtype != sites.dtype or y.dtype != sites.dtype:
        raise ValueError(f"rows of {x.dtype} and {y.dtype} with adapters of {sites.dtype}")
    if x.shape[1] != sites.width or y.shape[1] != sum(sites.out) or x.stride(1) != 1 or y.stride(1) != 1:
        raise ValueError("x and y do not fit the sites")
    tokens, parts = plan.tokens, splits(plan.tokens, sites.width)
    if h is None:
        h = scratch(plan, sites)
    elif h.numel() < scratch_elements(plan, sites):
        raise ValueError("the scratch memory is too small for these sites")
    columns = _COLUMNS if tokens == 16 else _PROMPT_COLUMNS
    tiles = sites.tiles(columns)
    here = processors(x.device)
    _shrink[(programs or 4 * here,)](
        x,
        plan.buffer,
        sites.a,
        h,
        x.stride(0),
        PIECES_AT=plan.piece_at,
        SITES=sites.count,
        SPLITS=parts,
        WIDTH=sites.width,
        TOKENS=tokens,
        RANKS=RANKS,
        STEP=128 if tokens <= 64 else 64,
        ALIGNED=sites.aligned,
        PRECISION=precision(x),
        num_warps=4,
        num_stages=4,
    )
    _expand[(programs or 8 * here,)](
        y,
        plan.buffer,
        sites.b,
        h,
        tiles,
        y.stride(0),
        PIECES_AT=plan.piece_at,
        SITES=sites.count,
        SPLITS=parts,
        TILES=tiles.shape[0],
        TOKENS=tokens,
        RANKS=RANKS,
        COLUMNS=columns,
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
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """h[piece, site, split] = x[tokens, part] . a[rows, part]; a unit is one (piece, site, split).

    Sites of a piece are neighbours, so their programs read the same x at the same time.
    """
    SHARE: tl.constexpr = (WIDTH + STEP * SPLITS - 1) // (STEP * SPLITS) * STEP
    EVEN: tl.constexpr = WIDTH == SHARE * SPLITS
    units = tl.load(plan + 1) * SITES * SPLITS
    for unit in range(tl.program_id(0), units, tl.num_programs(0)):
        site = unit % SITES
        split = unit // SITES % SPLITS
        piece = unit // (SITES * SPLITS)
        here = plan + PIECES_AT + piece * _PIECE
        group = plan + _HEADER + tl.load(here) * _GROUP
        r0, ranks = tl.load(here + 1), tl.load(here + 2)
        t0, tokens = tl.load(group), tl.load(group + 1)
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
        for step in range(0, SHARE, STEP):
            k = split * SHARE + step + tl.arange(0, STEP)
            if EVEN:
                x_tile = tl.load(x_rows + k[None, :], mask=t_seen, other=0.0)
                a_tile = tl.load(a_rows + k[:, None], mask=r_seen, other=0.0)
            else:
                x_tile = tl.load(x_rows + k[None, :], mask=t_seen & (k < WIDTH)[None, :], other=0.0)
                a_tile = tl.load(a_rows + k[:, None], mask=r_seen & (k < WIDTH)[:, None], other=0.0)
            total = multiply(x_tile, a_tile, total, PRECISION)
        out = h + (((piece * SITES + site) * SPLITS + split).to(tl.int64) * TOKENS + t)[:, None] * RANKS + r[None, :]
        tl.store(out, total, mask=t_seen & r_seen)


@triton.jit
def _expand(
    y,
    plan,
    table,
    h,
    tiles,
    y_stride,
    PIECES_AT: tl.constexpr,
    SITES: tl.constexpr,
    SPLITS: tl.constexpr,
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
        site, n0, width, y0 = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
        t0, tokens = tl.load(group), tl.load(group + 1)
        b = tl.load(table + site).to(tl.pointer_type(y.dtype.element_ty))
        if ALIGNED:
            b = tl.multiple_of(b, 16)
            width = tl.multiple_of(width, 8)
        n0 = tl.multiple_of(n0, COLUMNS)
        t = tl.arange(0, TOKENS)
        r = tl.arange(0, RANKS)
        n = tl.arange(0, COLUMNS)
        t_seen = (t < tokens)[:, None]
        n_seen = (n0 + n < width)[None, :]
        total = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
        for piece in range(tl.load(group + 2), tl.load(group + 3)):
            here = plan + PIECES_AT + piece * _PIECE
            r0, ranks = tl.load(here + 1), tl.load(here + 2)
            weight = tl.load(here + 3).to(tl.float32, bitcast=True)
            r_seen = r < ranks
            part = h + ((piece * SITES + site).to(tl.int64) * (SPLITS * TOKENS) + t)[:, None] * RANKS + r[None, :]
            low = tl.zeros([TOKENS, RANKS], dtype=tl.float32)
            for split in tl.static_range(SPLITS):
                low += tl.load(part + split * (TOKENS * RANKS), mask=t_seen & r_seen[None, :], other=0.0)
            b_tile = tl.load(
                b + (r0 + r).to(tl.int64)[:, None] * width + (n0 + n)[None, :],
                mask=r_seen[:, None] & n_seen,
                other=0.0,
            )
            total = multiply((low * weight).to(b_tile.dtype), b_tile, total, PRECISION)
        if ALIGNED:
            y0 = tl.multiple_of(y0, 8)
        out = y + (t0 + t).to(tl.int64)[:, None] * y_stride + (y0 + n)[None, :]
        seen = t_seen & n_seen
        base = tl.load(out, mask=seen, other=0.0).to(tl.float32)
        tl.store(out, (base + total).to(y.dtype.element_ty), mask=seen)
