"""The NF4 product in CUDA: its own source on the CPU, with a stand-in for the device; on a GPU where there is one."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.kernels.gpu import cuda, nf4, nf4_cuda
from server.kernels.gpu.nf4_cuda import Cut
from server.kernels.gpu.nf4_levels import LEVELS

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("c++")
RUN = """
#include "nf4_product.cu"
extern "C" void run(int columns, int slices, long room, const u16* x, long long x_stride, const u8* codes,
                    const void* scales, const u16* levels, const u16* bias, u16* y, float* parts, int* counters,
                    int rows, int out) {
    launch(columns, slices, room, [&] {
        nf4_product(x, x_stride, codes, scales, levels, bias, y, parts, counters, rows, out);
    });
}
extern "C" long long fetched() { return fetched_bytes; }
"""
TYPES = [torch.bfloat16, torch.float16]
LIMIT = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


@functools.cache
def on_the_cpu(cut: Cut, width: int, half: bool, wide: bool) -> ctypes.CDLL:
    """The kernel's source as a C++ program."""
    assert COMPILER is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "run.cpp").write_text(RUN)
        defined = [f"-D{name}={value}" for name, value in nf4_cuda.constants(cut, width, half, wide)]
        subprocess.run(
            [COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", "-DLORAPLEX_HOST", *defined, "-include", "host_cuda.h",
             "-I", str(HERE), "-I", str(Path(nf4_cuda.__file__).parent), str(folder / "run.cpp"),
             "-o", str(folder / "run.so")],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return ctypes.CDLL(str(folder / "run.so"))  # loaded, it needs its file no more


def product(x: Tensor, weight: nf4.Nf4Weight, bias: Tensor | None, cut: Cut, walkers: int) -> Tensor:
    """As `nf4_cuda.product` launches it, on the CPU, with everything that is to be written poisoned."""
    rows, width = x.shape
    out = weight.codes.shape[0]
    wide = weight.scales.dtype == torch.float32
    slices, tiles = cut.slices(width), cut.tiles(out)
    y = torch.full((rows, out), float("nan"), dtype=x.dtype)
    parts = torch.full((max(1, cut.parts(out, width)),), float("nan"))
    counters = torch.zeros(tiles, dtype=torch.int32)
    table = torch.tensor(LEVELS).to(x.dtype)
    tensors = [x, weight.codes, weight.scales, table, bias, y, parts, counters]
    at = [None if t is None else ctypes.c_void_p(t.data_ptr()) for t in tensors]
    on_the_cpu(cut, width, x.dtype == torch.float16, wide).run(
        min(-(-tiles // cut.walk), walkers), slices, ctypes.c_long(cut.shared), at[0],
        ctypes.c_longlong(x.stride(0)), *at[1:],
        rows, out,
    )  # fmt: skip
    assert not counters.any()
    return y


def weight_of(out: int, width: int, wide: bool) -> nf4.Nf4Weight:
    codes = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8)
    scales = (torch.rand(out, width // 64) + 0.5) * width**-0.5
    return nf4.Nf4Weight(codes, scales if wide else scales.half(), torch.tensor(LEVELS))


def meaning(x: Tensor, weight: nf4.Nf4Weight, bias: Tensor | None) -> Tensor:
    """In float64, by plain torch."""
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], -1).flatten(1).long()
    dense = weight.levels.double()[codes] * weight.scales.double().repeat_interleave(64, 1)
    y = x.double() @ dense.T
    return y if bias is None else y + bias.double()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", TYPES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("cut", "rows", "out", "width", "wide", "walkers"),
    [
        (Cut(1, 16, 2, warps=8), 1, 40, 1024, False, 2),  # one slice; two groups walk three tiles, the last not full
        (Cut(2, 32, 2, 2, warps=8), 2, 70, 2048, False, 1),  # two steps
        (Cut(8, 16, 2, 2, warps=8), 6, 33, 2880, True, 2),  # two slices, the second of an odd number of blocks
        (Cut(8, 32, 2), 5, 33, 640, True, 1),  # ten blocks for sixteen warps; an odd number of outputs
        (Cut(16, 16, 4, warps=8), 11, 50, 1088, False, 4),  # a warp with one of four blocks
        (Cut(8, 48, 4), 8, 48, 4096, False, 1),  # as a large model's
        (Cut(32, 16, 2, together=2), 31, 20, 2048, False, 1),  # sums in two passes
        (Cut(64, 16, 2, warps=8), 64, 17, 2048, False, 2),
        (Cut(64, 32, 2, warps=8, together=1), 33, 40, 576, True, 2),
        (Cut(32, 64, 2, warps=8, wgmma=True), 31, 70, 576, True, 1),  # by fours; two tiles, the last not full
        (Cut(32, 128, 2, 2, warps=8, wgmma=True), 18, 300, 1024, False, 2),  # two slices, two steps
        (Cut(16, 64, 4, warps=16, wgmma=True), 11, 64, 1088, False, 1),
        (Cut(64, 64, 2, 2, warps=16, together=2, wgmma=True), 64, 65, 1024, False, 2),
        (Cut(8, 64, 2, 3, warps=8, wgmma=True), 7, 50, 704, False, 1),
        (Cut(8, 32, 2, warps=8, by_registers=True), 5, 33, 1088, True, 2),
        (Cut(8, 32, 2, warps=8, by_registers=True, ahead=1), 8, 130, 1088, False, 2),
        (Cut(32, 64, 2, warps=8, wgmma=True, ahead=9), 17, 150, 576, False, 1),
        (Cut(8, 16, 2, 3, warps=8, apart=True), 7, 150, 384, False, 1),  # tiles of their own; two have a second one
        (Cut(1, 32, 4, 2, warps=8, apart=True), 1, 75, 1088, True, 2),  # three slices, groups without a tile for all
        (Cut(64, 64, 2, 2, warps=16, wgmma=True, apart=True), 50, 330, 576, False, 1),
        (Cut(32, 128, 4, warps=8, wgmma=True, apart=True), 32, 260, 256, False, 2),
    ],
)
def test_the_source_on_the_cpu(
    dtype: torch.dtype, cut: Cut, rows: int, out: int, width: int, wide: bool, walkers: int
) -> None:
    weight = weight_of(out, width, wide)
    bias = torch.randn(out).to(dtype) if rows % 2 else None
    x = torch.randn(rows, width + 8).to(dtype)[:, :width]  # rows with something between them
    y = product(x, weight, bias, cut, walkers)
    expected = meaning(x, weight, bias)
    assert (y.double() - expected).norm() <= LIMIT[dtype] * expected.norm()


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_order_of_a_sum_is_the_cuts_alone() -> None:
    """Who comes last, and how many others there are, changes no bit."""
    weight, cut = weight_of(80, 2048, False), Cut(8, 16, 2, warps=8)
    x = torch.randn(8, 2048).bfloat16()
    whole = product(x, weight, None, cut, 5)
    assert torch.equal(whole, product(x, weight, None, cut, 2))
    assert torch.equal(whole[3:4], product(x[3:4], weight, None, cut, 1))


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("cut", "out", "width", "walkers"),
    [
        (Cut(1, 16, 2, warps=8), 100, 1024, 2),
        (Cut(8, 16, 2, 2, warps=8), 150, 2880, 3),  # two slices, the second shorter
        (Cut(8, 16, 2, 3, warps=8, apart=True), 300, 384, 1),
        (Cut(64, 64, 2, 2, warps=16, wgmma=True, apart=True), 330, 576, 1),
    ],
)
def test_what_is_asked_for_early_is_every_code_once(cut: Cut, out: int, width: int, walkers: int) -> None:
    weight, x = weight_of(out, width, False), torch.randn(cut.rows, width).bfloat16()
    turns = -(-cut.tiles(out) // (cut.walk * min(walkers, -(-cut.tiles(out) // cut.walk))))
    for ahead, share in ((0, 0.0), (1, 1 / turns), (turns, 1.0)):
        asking = replace(cut, ahead=ahead)
        before = _fetched(asking, width)
        assert torch.equal(product(x, weight, None, asking, walkers), product(x, weight, None, cut, walkers))
        asked = (_fetched(asking, width) - before) / (out * width / 2)
        assert asked == share if ahead in (0, turns) else share <= asked < 1.0


def _fetched(cut: Cut, width: int) -> int:
    library = on_the_cpu(cut, width, False, False)
    library.fetched.restype = ctypes.c_longlong
    return int(library.fetched())


def test_bytes_asked_for_early_are_whole_turns() -> None:
    for rows in (1, 8, 32, 64):
        for out, width in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
            cut = nf4_cuda.best(rows, out, width, 132, 228 << 10, rows >= nf4_cuda.LEAST_FOURS)
            assert cut is not None
            once = cut.walkers(out, width, 132) * cut.walk * cut.outputs * width // 2
            turns = -(-cut.tiles(out) // (cut.walkers(out, width, 132) * cut.walk))
            assert [cut.asking(size, out, width, 132).ahead for size in (0, 1, once, once + 1, 1 << 40)] == [
                0, 1, 1, min(2, turns), turns,
            ]  # fmt: skip


def test_a_large_models_products_fit_the_card() -> None:
    """An H200 has 132 processors of 228 KiB, an L4 58 of 100 KiB."""
    for count, limit in ((132, 228 << 10), (58, 100 << 10)):
        for out, width in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (1024, 64), (960, 576)):
            for rows in (1, 2, 4, 8, nf4_cuda.MOST_ALONE, 32, nf4_cuda.MOST_ROWS):
                wgmma = rows >= nf4_cuda.LEAST_FOURS
                cut = nf4_cuda.best(rows, out, width, count, limit, wgmma)
                if limit < 200 << 10 and (wgmma or cut is None):
                    assert rows > 4
                    continue  # no card of that size has fours, or room for more than a few rows: Triton's kernel serves
                assert cut is not None, (limit, rows)
                assert cut.shared + 1024 <= limit
                assert cut.parts(out, width) <= nf4.PARTS
                assert cut.rows >= rows


def test_cuts_that_were_timed_on_a_card_are_taken_there() -> None:
    timed = nf4_cuda._timed(132, 228 << 10)
    assert {cut.rows for _, _, cut in timed} == {1, 8, 16, 32, 64}
    for out, width, cut in timed:
        assert nf4_cuda.best(cut.rows, out, width, 132, 228 << 10, cut.wgmma) == cut
        assert cut.wgmma == (cut.rows >= nf4_cuda.LEAST_FOURS)
        assert cut.shared + 1024 <= 228 << 10 and cut.parts(out, width) <= nf4.PARTS
    few = nf4_cuda.best(4, 28672, 4096, 132, 228 << 10)  # by the cut for the next more rows
    assert few is not None and few.rows == 4 and few.blocks == nf4_cuda.best(8, 28672, 4096, 132, 228 << 10).blocks  # type: ignore[union-attr]
    without = nf4_cuda.best(16, 28672, 4096, 132, 228 << 10, wgmma=False)
    assert without is not None and not without.wgmma


@pytest.mark.parametrize("fours", [True, False])
@pytest.mark.parametrize("dtype", TYPES, ids=["bfloat16", "float16"])
def test_all_that_a_product_will_take_is_compiled_together(
    dtype: torch.dtype, fours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card that is pretended: what `product` asks for, at any number of rows, has been asked for before, once, and
    by several threads."""
    asked: list[Any] = []
    launched: list[Any] = []
    first, another = iter([True]), threading.Event()

    def function(*constants: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            if next(first, False):
                assert another.wait(60), "one after the other"
            else:
                another.set()
        asked.append(constants)
        return lambda *arguments, **_: launched.append(arguments)

    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(nf4_cuda, "processors", lambda device: 132)
    monkeypatch.setattr(nf4_cuda, "_shared_limit", lambda device: 228 << 10)
    monkeypatch.setattr(nf4_cuda, "has_fours", lambda device: fours)
    monkeypatch.setattr(nf4_cuda, "_function", function)
    weights = [weight_of(out, 576, False) for out in (960, 70, 960, 1536, 130)]
    nf4_cuda.prepare([(weight.codes, weight.scales) for weight in weights], dtype)
    prepared = set(asked)
    assert len(prepared) == len(asked) > 0
    asked.clear()
    workspace = nf4.Workspace("cpu", parts=1 << 22)
    for weight in weights:
        for rows in range(1, nf4.FUSED_ROWS + 1):
            x = torch.zeros(rows, 576, dtype=dtype)
            nf4_cuda.product(x, weight.codes, weight.scales, None, workspace.parts, workspace.counters)
    assert set(asked) == prepared
    assert launched


def test_nothing_is_compiled_for_rows_that_the_product_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4_cuda, "cut_for", lambda *_: pytest.fail("nobody takes it"))
    weight = weight_of(64, 128, False)
    for available, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        monkeypatch.setattr(cuda, "available", lambda available=available: available)
        nf4_cuda.prepare([(weight.codes, weight.scales)], dtype)


@pytest.mark.skipif(not cuda.compilable(), reason="no NVRTC")
@pytest.mark.parametrize("rows", [8, 16, 32, 64])
def test_it_compiles_for_an_h200(rows: int) -> None:
    for out, width in ((6144, 4096), (28672, 4096), (4096, 14336)):
        cut = nf4_cuda.best(rows, out, width, 132, 228 << 10, rows >= nf4_cuda.LEAST_FOURS)
        assert cut is not None
        for asking in (cut, cut.asking(16 << 20, out, width, 132)):
            assert cuda.compiled("nf4_product", nf4_cuda.constants(asking, width, False, False), (9, 0))


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_triton_gives() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for rows, out, width in ((1, 4096, 4096), (7, 1000, 576), (33, 4096, 14336), (64, 6144, 4096)):
        weight = weight_of(out, width, False)
        there = nf4.Nf4Weight(weight.codes.cuda(), weight.scales.cuda(), weight.levels.cuda())
        x = torch.randn(rows, width).bfloat16()
        y = nf4.matmul(x.cuda(), there, nf4.Workspace("cuda"))
        expected = meaning(x, weight, None)
        assert (y.cpu().double() - expected).norm() <= 1e-2 * expected.norm()
