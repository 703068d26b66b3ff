"""Products with a weight in bitsandbytes' NF4, read as it lies: half a byte a weight instead of a dense copy a step.

    y[m, n] = sum over k of x[m, k] * scale[n, k / 64] * level[code[n, k]]

Up to `FUSED_ROWS` rows (a decode step) go through one kernel that unpacks in registers; more rows make the product
the larger part, so the weight is unpacked once into a dense temporary and torch multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.kernels.gpu import nf4_cuda
from server.kernels.gpu.launch import multiply, power_of_two, precision
from server.kernels.gpu.nf4_levels import unpack_asm

FUSED_ROWS = 64
BLOCK = 64  # weights that share a scale
PARTS = 1 << 24  # numbers in which groups of threads leave each other parts of sums: enough for 64 rows of an 8B model

_ASM = {torch.bfloat16: unpack_asm(torch.bfloat16), torch.float16: unpack_asm(torch.float16)}


@dataclass(frozen=True)
class Nf4Weight:
    """A weight [out, in] in NF4; `in` is a multiple of 64.

    codes: [out, in / 2] uint8, weight 2i in the high nibble of byte i. scales: [out, in / 64], float16 where that
    holds every one of them as a normal number and the rows are of 16 bits, else float32: 0.53 or 0.56 bytes a weight
    in all. bitsandbytes' nested scales take 0.516; they are unnested once at load, since every step would do it again
    (8 billion weights: 110 MB more, float32: 350 MB). levels: [16] float32.
    """

    codes: Tensor
    scales: Tensor
    levels: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1] * 2

    @property
    def nbytes(self) -> int:
        """Bytes a step reads of it."""
        return self.codes.nbytes + self.scales.nbytes


def from_bitsandbytes(packed: Tensor, state: Any, dtype: torch.dtype) -> Nf4Weight:
    """What a `Linear4bit` holds: its `weight.data` (which is not copied) and `weight.quant_state`, for rows of `dtype`.

    Raises ValueError for another quantization than NF4 in blocks of 64, and for rows that end inside a block.
    """
    out, width = state.shape
    if state.quant_type != "nf4" or state.blocksize != BLOCK or width % BLOCK:
        raise ValueError(
            f"NF4 in blocks of 64 along whole rows is served, not {state.quant_type} in blocks of {state.blocksize} "
            f"over [{out}, {width}]"
        )
    scales = state.absmax
    if state.nested:
        coarse = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: scales.numel()]
        scales = state.state2.code[scales.long()] * coarse + state.offset
    scales = scales.float().view(out, width // BLOCK)
    if dtype != torch.float32 and _normal_in_float16(scales):
        scales = scales.half()
    return Nf4Weight(packed.view(torch.uint8).view(out, width // 2), scales.contiguous(), state.code.float())


def side_by_side(weights: Sequence[Nf4Weight]) -> Nf4Weight:
    """One weight [sum of out, in] of several with the same input; copies."""
    wide = any(weight.scales.dtype == torch.float32 for weight in weights)
    scales = torch.cat([weight.scales.float() if wide else weight.scales for weight in weights])
    return Nf4Weight(torch.cat([weight.codes for weight in weights]), scales, weights[0].levels)


def _normal_in_float16(scales: Tensor) -> bool:
    size = scales.abs()
    limits = torch.finfo(torch.float16)
    return bool(((size <= limits.max) & ((size >= limits.tiny) | (size == 0))).all())


class Workspace:
    """Memory in which programs that split one sum leave their parts, and counters of how many have; one per stream.

    The counters are zero between launches: the last program of each tile of the output resets its own.
    """

    def __init__(self, device: torch.device | str, parts: int = PARTS, tiles: int = 1 << 14) -> None:
        self.parts = torch.empty(parts, dtype=torch.float32, device=device)
        self.counters = torch.zeros(tiles, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Tiling:
    """How a product is cut up: `columns` outputs a program, its input in `splits` parts."""

    columns: int
    splits: int
    warps: int = 4
    stages: int = 6


def tiling(rows: int, out: int, width: int) -> Tiling:
    """For a GPU of about 130 processors; `rows` counts by its power of two alone, so few batches differ in it.

    Enough programs for a few on every processor, yet at least 512 inputs in each: a part of the sum is written and
    read again as `rows` numbers of 4 bytes for every 32 bytes of codes. Wide tiles where there are enough of them:
    instructions, not bytes, are what there is too much of, and they share what every program does for x.
    """
    columns = 128 if out >= 8192 else 64
    blocks, tiles = width // BLOCK, -(-out // columns)
    least = 8 if power_of_two(rows) == 16 else 16
    return Tiling(columns, max(1, min(blocks // least, 512 // tiles)))


def matmul(
    x: Tensor, weight: Nf4Weight, workspace: Workspace, bias: Tensor | None = None, cut: Tiling | None = None
) -> Tensor:
    """y [M, out] of x [M, in] in x's dtype, summed in float32. x: contiguous rows; bias: [out] or None.

    `workspace`: of the stream this runs on. `cut`: another tiling than `tiling` gives.
    """
    rows, width = x.shape
    out, expected = weight.shape
    if width != expected or x.stride(1) != 1:
        raise ValueError(f"x of {width} columns times a weight [{out}, {expected}]")
    if rows > FUSED_ROWS:
        return torch.nn.functional.linear(x, dequantize(weight, x.dtype), bias)
    if x.is_cuda and cut is None:
        done = nf4_cuda.product(x, weight.codes, weight.scales, bias, workspace.parts, workspace.counters)
        if done is not None:
            return done
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    cut = cut or tiling(rows, out, width)
    tiles, padded = -(-out // cut.columns), power_of_two(rows)
    if cut.splits > 1 and (
        tiles * cut.splits * cut.columns * padded > workspace.parts.numel() or tiles > workspace.counters.numel()
    ):
        raise ValueError(f"the workspace is too small for {rows} rows of {out} outputs in {cut.splits} parts")
    _matmul[(tiles, cut.splits)](
        x,
        weight.codes.view(torch.int16),
        weight.scales,
        weight.levels,
        bias if bias is not None else x,
        y,
        workspace.parts,
        workspace.counters,
        rows,
        x.stride(0),
        OUT=out,
        WIDTH=width,
        ROWS=padded,
        COLUMNS=cut.columns,
        SPLITS=cut.splits,
        BLOCK=BLOCK,
        BIAS=bias is not None,
        ASM=_asm(x, weight),
        PRECISION=precision(x),
        num_warps=cut.warps,
        num_stages=cut.stages,
    )
    return y


def _asm(x: Tensor, weight: Nf4Weight) -> str:
    """How to unpack: by the instructions of `nf4_levels`, or "" by a table (in the interpreter, and for float32)."""
    return _ASM.get(x.dtype, "") if x.is_cuda else ""


def dequantize(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """The dense weight [out, in]."""
    out, width = weight.shape
    dense = torch.empty(out, width, dtype=dtype, device=weight.codes.device)
    columns, blocks = 16, 4
    _dequantize[(-(-out // columns), -(-width // (BLOCK * blocks)))](
        weight.codes,
        weight.scales,
        weight.levels,
        dense,
        OUT=out,
        WIDTH=width,
        COLUMNS=columns,
        STEP=BLOCK * blocks,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return dense


@triton.jit
def _levels_of_four(codes, levels, ASM: tl.constexpr, DTYPE: tl.constexpr):
    """Of int16 holding four weights each: the levels of their first, second, third and fourth, each of codes' shape."""
    if ASM != "":
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r", [codes], dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2
        )
        w0, w1 = w0.to(DTYPE, bitcast=True), w1.to(DTYPE, bitcast=True)
        w2, w3 = w2.to(DTYPE, bitcast=True), w3.to(DTYPE, bitcast=True)
    else:
        wide = codes.to(tl.int32)
        w0, w1 = tl.load(levels + (wide >> 4 & 15)).to(DTYPE), tl.load(levels + (wide & 15)).to(DTYPE)
        w2, w3 = tl.load(levels + (wide >> 12 & 15)).to(DTYPE), tl.load(levels + (wide >> 8 & 15)).to(DTYPE)
    return w0, w1, w2, w3


@triton.jit(do_not_specialize=["rows"])  # batches of one tile size share a kernel
def _matmul(
    x,
    codes,
    scales,
    levels,
    bias,
    y,
    parts,
    counters,
    rows,
    x_stride,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of outputs, one part of the input. The weight is the left operand, so that few rows are no waste.

    A block's scale multiplies its finished sum, not its 64 weights: fewer operations and less rounding. Codes are
    read as int16, four weights each: so a thread finds what it multiplies in whole registers and moves no bytes.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    BLOCKS: tl.constexpr = WIDTH // BLOCK
    SHARE: tl.constexpr = (BLOCKS + SPLITS - 1) // SPLITS
    QUARTER: tl.constexpr = BLOCK // 4
    m = tl.arange(0, ROWS)
    n = tile * COLUMNS + tl.arange(0, COLUMNS)
    # Columns past the last compute the last one again: cheaper than a mask on every load.
    n_read = tl.minimum(n, OUT - 1)
    code_rows = codes + n_read.to(tl.int64)[:, None] * (WIDTH // 4) + tl.arange(0, QUARTER)[None, :]
    scale_rows = scales + n_read * BLOCKS
    x_rows = x + m.to(tl.int64)[:, None] * x_stride + tl.arange(0, BLOCK)[None, :]
    seen = (m < rows)[:, None]
    total = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
    for block in range(split * SHARE, tl.minimum((split + 1) * SHARE, BLOCKS)):
        x_tile = tl.load(x_rows + block * BLOCK, mask=seen, other=0.0)
        packed = tl.load(code_rows + block * QUARTER)
        scale = tl.load(scale_rows + block).to(tl.float32)
        w0, w1, w2, w3 = _levels_of_four(packed, levels, ASM, x.dtype.element_ty)
        even, odd = tl.split(tl.reshape(x_tile, [ROWS, QUARTER, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        part = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
        part = multiply(w0, tl.trans(x0), part, PRECISION)
        part = multiply(w1, tl.trans(x1), part, PRECISION)
        part = multiply(w2, tl.trans(x2), part, PRECISION)
        part = multiply(w3, tl.trans(x3), part, PRECISION)
        total += part * scale[:, None]
    out = y + m.to(tl.int64)[None, :] * OUT + n[:, None]
    written = (m < rows)[None, :] & (n < OUT)[:, None]
    if SPLITS == 1:
        if BIAS:
            total += tl.load(bias + n_read).to(tl.float32)[:, None]
        tl.store(out, total.to(y.dtype.element_ty), mask=written)
    else:
        inside = tl.arange(0, COLUMNS)[:, None] * ROWS + m[None, :]
        tl.store(parts + (tile * SPLITS + split) * (COLUMNS * ROWS) + inside, total)
        # All threads' parts are written before one of them counts; whoever counts last sees everybody's.
        tl.debug_barrier()
        done = tl.atomic_add(counters + tile, 1, sem="acq_rel")
        if done == SPLITS - 1:
            # In the order of the parts, not of their arrival: the same sum every time.
            total = tl.zeros([COLUMNS, ROWS], dtype=tl.float32)
            for other in range(SPLITS):
                total += tl.load(parts + (tile * SPLITS + other) * (COLUMNS * ROWS) + inside, cache_modifier=".cg")
            if BIAS:
                total += tl.load(bias + n_read).to(tl.float32)[:, None]
            tl.store(out, total.to(y.dtype.element_ty), mask=written)
            tl.store(counters + tile, 0)


@triton.jit
def _dequantize(
    codes,
    scales,
    levels,
    dense,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dense[n, k] = scale * level for one tile of COLUMNS rows of the weight and STEP inputs."""
    n = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[:, None]
    pair = tl.program_id(1) * (STEP // 2) + tl.arange(0, STEP // 2)[None, :]
    seen = (n < OUT) & (pair < WIDTH // 2)
    packed = tl.load(codes + n * (WIDTH // 2) + pair, mask=seen, other=0).to(tl.int32)
    scale = tl.load(scales + n * (WIDTH // BLOCK) + pair // (BLOCK // 2), mask=seen, other=0.0).to(tl.float32)
    high, low = tl.load(levels + (packed >> 4)), tl.load(levels + (packed & 15))
    both = tl.reshape(tl.join(high * scale, low * scale), [COLUMNS, STEP])
    k = tl.program_id(1) * STEP + tl.arange(0, STEP)[None, :]
    tl.store(dense + n * WIDTH + k, both.to(dense.dtype.element_ty), mask=(n < OUT) & (k < WIDTH))
