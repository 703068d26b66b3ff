"""LoRA over the arena against its plain-torch meaning in float64: fresh inputs, poisoned memory, odd ranks."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.kernels import reference
from server.kernels.gpu import lora
from server.kernels.gpu.lora import LoraSites, lora_add, lora_begin, scratch, splits
from server.kernels.gpu.lora_plan import LoraPlan, Segment

Close = Callable[[Tensor, Tensor], None]
NAN = float("nan")

# The interpreter computes in numpy, which warns of the NaN and infinities that these tests put there.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def tensor(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape).to(dtype).to(device)


def meant(y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], segments: list[Segment]) -> Tensor:
    out = y.double().cpu()
    at = 0
    for one_a, one_b in zip(a, b, strict=True):
        part = out[:, at : at + one_b.shape[1]]
        reference.lora_add(part, x.double().cpu(), one_a.double().cpu(), one_b.double().cpu(), segments)
        at += one_b.shape[1]
    return out


def adapters(rng: random.Random, count: int) -> tuple[list[tuple[int, int]], int]:
    """Row ranges of `count` adapters with odd ranks, in whole blocks of 8, with gaps; and the arena's rows."""
    ranges, at = [], 0
    for _ in range(count):
        at += rng.choice([0, 8])
        rank = rng.choice([1, 3, 4, 8, 12, 16, 17, 33])
        ranges.append((at, at + rank))
        at += -(-rank // 8) * 8
    return ranges, at


def arena(ranges: list[tuple[int, int]], rows: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random where an adapter is, NaN everywhere else: those rows are somebody else's."""
    out = torch.full((rows, width), NAN)
    for r0, r1 in ranges:
        out[r0:r1] = torch.randn(r1 - r0, width) * width**-0.5
    return out.to(dtype).to(device)


@pytest.mark.parametrize(("popularity", "weighted"), [("distinct", True), ("zipf", True), ("identical", False)])
def test_decoding_rows(
    popularity: str, weighted: bool, dtype: torch.dtype, device: str, close: Close, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random()
    ranges, rows = adapters(rng, 8)
    order = sorted(
        {
            "distinct": list(range(8)),
            "zipf": rng.choices(range(8), [1 / (i + 1) ** 1.2 for i in range(8)], k=8),
            "identical": [rng.randrange(8)] * 8,
        }[popularity]
    )
    segments: list[Segment] = []
    base_only = {2, 7}
    for token, adapter in enumerate(order):
        if token in base_only:
            continue
        weight = rng.uniform(-2, 2) if weighted else 1.0
        segments.append((token, token + 1, *ranges[adapter], weight))
        if weighted:
            segments.append((token, token + 1, *ranges[(adapter + 3) % 8], 0.5))
    width, outs = 136, [72, 40, 300]
    a = [arena(ranges, rows, width, dtype, device) for _ in outs]
    b = [arena(ranges, rows, out, dtype, device) for out in outs]
    x, y = tensor(9, width, dtype=dtype, device=device), tensor(9, sum(outs), dtype=dtype, device=device)
    untouched = [*base_only, 8]
    x[untouched] = NAN
    y[untouched] = NAN
    expected = meant(y, x, a, b, segments)
    plan, sites = LoraPlan(device, tokens=8, groups=16, pieces=64), LoraSites(a, b)
    plan.fill(segments)
    h = scratch(plan, sites).fill_(NAN)
    halved = y.clone()
    lora_add(y, x, sites, plan, h, programs=3)
    h.fill_(NAN)
    monkeypatch.setattr(lora, "SHRINK_FIRST", True)
    lora_begin(x, sites, plan, h)(halved)
    assert torch.equal(halved.nan_to_num(), y.nan_to_num()) and torch.equal(halved.isnan(), y.isnan())
    assert torch.isnan(y[untouched]).all(), "a row on the base alone was written"
    used = [t for t in range(8) if t not in base_only]
    close(y[used], expected[used])


def test_splits_of_a_wide_input(dtype: torch.dtype, device: str, close: Close) -> None:
    width = 1100  # two splits, neither a multiple of the step
    assert splits(8, width) == 3
    a, b = [arena([(0, 16)], 16, width, dtype, device)], [arena([(0, 16)], 16, 24, dtype, device)]
    x, y = tensor(3, width, dtype=dtype, device=device), tensor(3, 24, dtype=dtype, device=device)
    segments: list[Segment] = [(0, 3, 0, 5, 1.0), (1, 2, 8, 16, -1.5)]
    expected = meant(y, x, a, b, segments)
    plan, sites = LoraPlan(device, tokens=8, groups=4, pieces=4), LoraSites(a, b)
    plan.fill(segments)
    lora_add(y, x, sites, plan, scratch(plan, sites).fill_(NAN), programs=2)
    close(y, expected)


def test_prompts(dtype: torch.dtype, device: str, close: Close, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long spans, one of them with two adapters that begin and end at different tokens."""
    ranges, rows = adapters(random.Random(), 4)
    segments: list[Segment] = [(3, 40, *ranges[0], 1.0), (40, 47, *ranges[1], 0.5), (30, 44, *ranges[2], -1.0)]
    a, b = [arena(ranges, rows, 64, dtype, device)], [arena(ranges, rows, 136, dtype, device)]
    x, y = tensor(50, 64, dtype=dtype, device=device), tensor(50, 136, dtype=dtype, device=device)
    y[:3] = NAN
    y[47:] = NAN
    expected = meant(y, x, a, b, segments)
    plan, sites = LoraPlan(device, tokens=32, groups=8, pieces=32), LoraSites(a, b)
    plan.fill(segments)
    halved = y.clone()
    lora_add(y, x, sites, plan, scratch(plan, sites).fill_(NAN))
    monkeypatch.setattr(lora, "SHRINK_FIRST", True)
    lora_begin(x, sites, plan)(halved)
    assert torch.equal(halved[3:47], y[3:47])
    assert torch.isnan(y[:3]).all()
    assert torch.isnan(y[47:]).all()
    close(y[3:47], expected[3:47])


def test_a_plan_filled_again_forgets_the_last_step(device: str) -> None:
    a, b = torch.randn(16, 32).to(device), torch.randn(16, 32).to(device)
    plan, sites = LoraPlan(device, tokens=8, groups=4, pieces=4), LoraSites([a], [b])
    where = plan.buffer.data_ptr()
    plan.fill([(0, 2, 0, 16, 1.0), (2, 3, 0, 16, 1.0)])
    plan.fill([(1, 2, 3, 3, 1.0), (2, 2, 0, 8, 1.0)])  # rank 0, and no tokens
    assert plan.empty
    y = torch.full((3, 32), NAN, device=device)
    lora_add(y, torch.randn(3, 32).to(device), sites, plan, programs=2)
    assert torch.isnan(y).all()
    plan.fill([(1, 2, 0, 8, 1.0)])
    assert not plan.empty
    assert plan.buffer.data_ptr() == where  # a captured graph reads there
    y = torch.randn(3, 32).to(device)
    x = torch.randn(3, 32).to(device)
    expected = meant(y, x, [a], [b], [(1, 2, 0, 8, 1.0)])
    lora_add(y, x, sites, plan, programs=2)
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-4, atol=1e-4)


def test_a_neighbours_overflow_stays_its_own(device: str) -> None:
    a, b = torch.ones(16, 32, device=device), torch.ones(16, 16, device=device)
    a[:8] = torch.inf
    plan = LoraPlan(device, tokens=8, groups=4, pieces=4)
    plan.fill([(0, 2, 8, 16, 1.0), (0, 1, 0, 8, 1.0)])
    y = torch.zeros(2, 16, device=device)
    lora_add(y, torch.ones(2, 32, device=device), LoraSites([a], [b]), plan, programs=1)
    assert not torch.isfinite(y[0]).any()
    assert (y[1] == 8 * 32).all()


def test_more_than_fits_is_refused_and_leaves_the_plan(device: str) -> None:
    plan = LoraPlan(device, tokens=8, groups=2, pieces=3)
    plan.fill([(0, 4, 0, 8, 1.0)])
    before = plan.buffer.clone()
    with pytest.raises(ValueError, match=r"room for 2 groups and 3 pieces, the batch has 1 and 4"):
        plan.fill([(0, 4, 0, 64, 1.0)])
    with pytest.raises(ValueError, match="the batch has 5 and 5"):
        plan.fill([(0, 33, 0, 8, 1.0)])
    assert torch.equal(plan.buffer, before)


def test_what_does_not_fit_the_sites_is_refused(device: str) -> None:
    a, b = torch.ones(8, 32, device=device), torch.ones(8, 16, device=device)
    plan = LoraPlan(device, tokens=8, groups=2, pieces=2)
    with pytest.raises(ValueError, match="does not fit"):
        lora_add(torch.zeros(2, 24, device=device), torch.zeros(2, 32, device=device), LoraSites([a], [b]), plan)
    with pytest.raises(ValueError, match="bfloat16"):
        lora_add(
            torch.zeros(2, 16, device=device),
            torch.zeros(2, 32, dtype=torch.bfloat16, device=device),
            LoraSites([a], [b]),
            plan,
        )
    with pytest.raises(ValueError, match="one width"):
        LoraSites([a, b], [b, b])
