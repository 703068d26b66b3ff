"""The LoRA kernels in CUDA: their own source run on the CPU by a stand-in for the device, against float64."""

from __future__ import annotations

import ctypes
import functools
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.kernels import reference
from server.kernels.gpu import cuda, lora, lora_cuda
from server.kernels.gpu.lora import LoraSites
from server.kernels.gpu.lora_cuda import Cut
from server.kernels.gpu.lora_plan import DECODE_TOKENS, LoraPlan, Segment

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("c++")
NAN = float("nan")
CUT = Cut()
SHRINK = """
#include "lora_rows.cu"
extern "C" void run(int groups, const u16* x, int x_stride, const int* plan, int pieces_at, const u64* table,
                    float* h) {
    launch(groups, 1, 16, [&] { lora_rows(x, x_stride, plan, pieces_at, table, h); });
}
"""
EXPAND = """
#include "lora_rows.cu"
extern "C" void run(int groups, u16* y, int y_stride, const int* plan, int pieces_at, const u64* tiles, int tile_count,
                    const float* h) {
    launch(groups, 1, 16, [&] { lora_rows(y, y_stride, plan, pieces_at, tiles, tile_count, h); });
}
"""
TYPES = [torch.bfloat16, torch.float16]
LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@functools.cache
def on_the_cpu(source: str, constants: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """The kernel's source as a C++ program."""
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.cpp").write_text(source)
        defined = [f"-D{name}={value}" for name, value in constants]
        subprocess.run(
            [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-DLORAPLEX_HOST", *defined,
             "-include", "host_cuda.h", "-I", str(HERE), "-I", str(Path(lora_cuda.__file__).parent),
             str(folder / "run.cpp"), "-o", str(folder / "run.so")],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return ctypes.CDLL(str(folder / "run.so"))  # loaded, it needs its file no more


def add(y: Tensor, x: Tensor, sites: LoraSites, plan: LoraPlan, cut: Cut = CUT, groups: int = 2) -> None:
    """As `lora_add` launches it, on the CPU, with everything that is to be written poisoned."""
    h = lora.scratch(plan, sites).fill_(NAN)
    parts, share = lora.splits(plan.tokens, sites.width), lora._share(sites.width)
    shrink = lora_cuda.shrink_constants(x.dtype, sites.count, parts, share, sites.width, cut)
    at = [ctypes.c_void_p(t.data_ptr()) for t in (x, plan.buffer, sites.a, h, y, sites.tiles(cut.columns))]
    on_the_cpu(SHRINK, shrink).run(groups, at[0], x.stride(0), at[1], plan.piece_at, at[2], at[3])
    expand = lora_cuda.expand_constants(x.dtype, sites.count, parts, cut)
    tiles = sites.tiles(cut.columns).shape[0]
    on_the_cpu(EXPAND, expand).run(groups, at[4], y.stride(0), at[1], plan.piece_at, at[5], tiles, at[3])


def meant(y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], segments: list[Segment]) -> Tensor:
    out, at = y.double(), 0
    for one_a, one_b in zip(a, b, strict=True):
        part = out[:, at : at + one_b.shape[1]]
        reference.lora_add(part, x.double(), one_a.double(), one_b.double(), segments)
        at += one_b.shape[1]
    return out


def arena(ranges: list[tuple[int, int]], rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Random where an adapter is, NaN everywhere else: those rows are somebody else's."""
    out = torch.full((rows, width), NAN)
    for r0, r1 in ranges:
        out[r0:r1] = torch.randn(r1 - r0, width) * width**-0.5
    return out.to(dtype)


def ranges_of(ranks: list[int]) -> tuple[list[tuple[int, int]], int]:
    """Arena rows of adapters of these ranks, in whole blocks of 8, with gaps; and the arena's rows."""
    ranges, at = [], 8
    for rank in ranks:
        ranges.append((at, at + rank))
        at += -(-rank // 8) * 8 + 8
    return ranges, at


def popular(popularity: str, count: int, tokens: int) -> list[int]:
    rng = random.Random()
    return {
        "distinct": [t % count for t in range(tokens)],
        "uniform": sorted(rng.choices(range(count), k=tokens)),
        "zipf": sorted(rng.choices(range(count), [1 / (i + 1) ** 1.2 for i in range(count)], k=tokens)),
        "identical": [rng.randrange(count)] * tokens,
    }[popularity]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", TYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical"])
def test_rows_of_a_decode_step(popularity: str, dtype: torch.dtype) -> None:
    ranges, rows = ranges_of([5, 8, 16, 33, 64, 1, 17])
    segments: list[Segment] = []
    base_only = {3, 12}
    for token, adapter in enumerate(popular(popularity, len(ranges), 19)):
        if token in base_only:
            continue
        segments.append(
            (token, token + 1, *ranges[adapter], random.uniform(-2, 2) if popularity != "identical" else 1.0)
        )
        if popularity in ("uniform", "zipf"):
            segments.append((token, token + 1, *ranges[(adapter + 3) % len(ranges)], 0.5))
    width, outs = 136, [72, 40, 304]
    a, b = [arena(ranges, rows, width, dtype) for _ in outs], [arena(ranges, rows, out, dtype) for out in outs]
    x = torch.randn(20, width + 8).to(dtype)[:, :width]
    y = torch.randn(20, sum(outs) + 8).to(dtype)[:, : sum(outs)]
    untouched = [*base_only, 19]
    x[untouched] = NAN
    y[untouched] = NAN
    expected = meant(y, x, a, b, segments)
    plan = LoraPlan("cpu", tokens=DECODE_TOKENS, groups=20, pieces=200)
    plan.fill(segments)
    add(y, x, LoraSites(a, b), plan)
    assert torch.isnan(y[untouched]).all(), "a row on the base alone was written"
    used = [t for t in range(19) if t not in base_only]
    assert (y[used].double() - expected[used]).norm() <= LIMIT[dtype] * expected[used].norm()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("width", [1104, 14336])
def test_wide_inputs_are_split(width: int) -> None:
    """1104: the last of three splits is not full; 14336: splits of two steps."""
    a, b = [arena([(0, 16)], 16, width, torch.bfloat16)], [arena([(0, 16)], 16, 200, torch.bfloat16)]
    x, y = torch.randn(3, width).bfloat16(), torch.randn(3, 200).bfloat16()
    segments: list[Segment] = [(0, 3, 0, 5, 1.0), (1, 2, 8, 16, -1.5)]
    expected = meant(y, x, a, b, segments)
    plan = LoraPlan("cpu", tokens=DECODE_TOKENS, groups=4, pieces=4)
    plan.fill(segments)
    for cut in (Cut(blocks=1), Cut(blocks=2)):
        got = y.clone()
        add(got, x, LoraSites(a, b), plan, cut)
        assert (got.double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_company_changes_no_bit() -> None:
    """A row alone, among others, and sharing its adapter with others, gets the same sum."""
    ranges, rows = ranges_of([16, 40, 8])
    a, b = [arena(ranges, rows, 1024, torch.bfloat16)], [arena(ranges, rows, 128, torch.bfloat16)]
    x, base = torch.randn(12, 1024).bfloat16(), torch.randn(12, 128).bfloat16()
    plan, sites = LoraPlan("cpu", tokens=DECODE_TOKENS, groups=12, pieces=48), LoraSites(a, b)
    found = []
    for segments in (
        [(5, 6, *ranges[1], 0.5)],
        [(0, 12, *ranges[1], 0.5)],
        [(0, 5, *ranges[0], 1.0), (5, 6, *ranges[1], 0.5), (6, 12, *ranges[2], 1.0)],
    ):
        y = base.clone()
        plan.fill(segments)
        add(y, x, sites, plan)
        found.append(y[5])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_a_neighbours_overflow_stays_its_own() -> None:
    a, b = torch.ones(16, 32).bfloat16(), torch.ones(16, 16).bfloat16()
    a[:8] = torch.inf
    plan = LoraPlan("cpu", tokens=DECODE_TOKENS, groups=4, pieces=4)
    plan.fill([(0, 2, 8, 16, 1.0), (0, 1, 0, 8, 1.0)])
    y = torch.zeros(2, 16).bfloat16()
    add(y, torch.ones(2, 32).bfloat16(), LoraSites([a], [b]), plan)
    assert not torch.isfinite(y[0]).any()
    assert (y[1] == 8 * 32).all()


@pytest.mark.skipif(not cuda.compilable(), reason="no NVRTC")
def test_it_compiles_for_an_h200() -> None:
    cut = Cut()
    for sites, width in ((3, 4096), (1, 14336)):
        parts, share = lora.splits(DECODE_TOKENS, width), lora._share(width)
        assert cuda.compiled(
            "lora_rows", lora_cuda.shrink_constants(torch.bfloat16, sites, parts, share, width, cut), (9, 0)
        )
        assert cuda.compiled("lora_rows", lora_cuda.expand_constants(torch.float16, sites, parts, cut), (9, 0))
