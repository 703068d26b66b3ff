"""From a file's tensors to the arena's layout, natively and with torch: the same bits, the same refusals."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from torch import Tensor

from hub.lora_config import LoraConfig
from server.adapters import rank_rows as rank_rows_module
from server.adapters.arena import Arena, Rows
from server.adapters.rank_rows import Pair, rank_rows
from server.adapters.weights import LoraWeights
from server.errors import AdapterUnservable
from server.kernels.native import loading

CONFIG = LoraConfig.parse(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 12, "target_modules": ["q"]}).encode())
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["native", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways through the same tests."""
    if request.param == "torch":
        monkeypatch.setattr(loading, "library", lambda: None)
    elif loading.library() is None:
        pytest.skip("no C compiler on this machine")
    return str(request.param)


def pair(source: torch.dtype) -> Pair:
    rank, width, out = (random.randrange(1, 150) for _ in range(3))
    return Pair((torch.randn(rank, width) * 3).to(source), torch.randn(out, rank).to(source))


def meant(given: Pair, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scaled = given.b.float() * CONFIG.scaling("q", given.a.shape[0])
    return given.a.to(dtype), scaled.T.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_scaled_in_float32_and_rounded_once(way: str, source: torch.dtype, dtype: torch.dtype) -> None:
    pairs = {f"m{i}": pair(source) for i in range(5)}
    sites = rank_rows(pairs, CONFIG, dtype)
    assert list(sites) == list(pairs)
    for module, given in pairs.items():
        a, b = meant(given, dtype)
        assert torch.equal(sites[module].a, a)
        assert torch.equal(sites[module].b, b)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_the_tensor_that_is_not_finite_is_named(way: str, source: torch.dtype, odd: float) -> None:
    pairs = {f"m{i}": pair(source) for i in range(3)}
    half = random.choice(["a", "b"])
    spoiled: Tensor = getattr(pairs["m1"], half)
    spoiled.view(-1)[random.randrange(spoiled.numel())] = odd
    with pytest.raises(AdapterUnservable, match=rf"m1\.lora_{half.upper()} holds NaN or infinite values"):
        rank_rows(pairs, CONFIG, torch.bfloat16)


def test_not_contiguous_and_empty(way: str) -> None:
    given = Pair(torch.randn(40, 8).T, torch.randn(8, 24).T)
    site = rank_rows({"m": given}, CONFIG, torch.float32)["m"]
    assert torch.equal(site.a, given.a)
    assert torch.allclose(site.b, given.b.T * CONFIG.scaling("m", 8))
    assert rank_rows({}, CONFIG, torch.float32) == {}


@pytest.mark.parametrize("dtype", DTYPES)
def test_written_rows_and_no_others(way: str, dtype: torch.dtype) -> None:
    """An adapter with a smaller rank at one site and none at another: what it leaves of its rows is zero."""
    shapes = {"q": (24, 40), "k": (8, 40), "none": (16, 16)}
    arena = Arena(shapes, 64, dtype, "cpu")
    for matrix in (*arena.a.values(), *arena.b.values()):
        matrix.fill_(7)
    rows = arena.allocate(16)
    rows = arena.allocate(16)  # not the first ones
    assert rows == Rows(16, 32)
    pairs = {"q": Pair(torch.randn(13, 40), torch.randn(24, 13)), "k": Pair(torch.randn(5, 40), torch.randn(8, 5))}
    sites = rank_rows(pairs, CONFIG, dtype)
    arena.write(rows, LoraWeights("d", 13, sites, ()))
    for site, (out, inner) in shapes.items():
        rank = pairs[site].a.shape[0] if site in pairs else 0
        for matrix, width, which in ((arena.a[site], inner, "a"), (arena.b[site], out, "b")):
            expected = torch.full((64, width), 7.0, dtype=dtype)
            expected[16:32] = 0
            if rank:
                expected[16 : 16 + rank] = getattr(sites[site], which)
            assert torch.equal(matrix, expected)


def test_torch_is_not_asked_where_the_compiler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way is the one in use: else the figures would tell of the other."""
    if loading.library() is None:
        pytest.skip("no C compiler on this machine")
    monkeypatch.setattr(rank_rows_module, "_convert_with_torch", None)
    assert rank_rows({"m": pair(torch.float16)}, CONFIG, torch.bfloat16)
