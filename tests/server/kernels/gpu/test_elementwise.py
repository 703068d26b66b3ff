"""Norm, activation, rotation with its cache writes, and DoRA's norms, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from server.kernels.gpu.elementwise import rms_norm, rope_store, row_norms, silu_mul

Close = Callable[[Tensor, Tensor], None]
NAN = float("nan")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double().cpu(), weight.double().cpu()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("width", [64, 100])
def test_rms_norm(width: int, dtype: torch.dtype, device: str, close: Close) -> None:
    x, weight = torch.randn(1, 3, width).to(dtype).to(device), torch.randn(width).to(dtype).to(device)
    close(rms_norm(x, weight, 0.1), normed(x, weight, 0.1))


def test_rms_norm_of_a_sum(dtype: torch.dtype, device: str, close: Close) -> None:
    x, residual, weight = (torch.randn(*shape).to(dtype).to(device) for shape in [(4, 72), (4, 72), (72,)])
    expected = (x.double() + residual.double()).cpu()
    got = rms_norm(x, weight, 1e-5, residual)
    close(residual, expected)
    close(got, normed(residual, weight, 1e-5))


def test_silu_mul(dtype: torch.dtype, device: str, close: Close) -> None:
    gate_up = (torch.randn(3, 2 * 1030) * 10).to(dtype).to(device)
    gate, up = gate_up.double().cpu().chunk(2, -1)
    close(silu_mul(gate_up), torch.nn.functional.silu(gate) * up)


def test_silu_of_a_very_negative_gate_is_zero(device: str) -> None:
    assert silu_mul(torch.tensor([[-1e4, 1e4, 2.0, 2.0]], device=device)).tolist() == [[0.0, 2e4]]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Llama's rotation: x cos + (-second half, first half) sin."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(3, 1, 24), (4, 2, 16)])
def test_rope_store(heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str, close: Close) -> None:
    rows, slots = 4, 9
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * width + 8).to(dtype).to(device)[:, :-8]
    angle = torch.rand(rows, width // 2) * 6
    cos, sin = (torch.cat([f(angle)] * 2, -1).to(dtype).to(device) for f in (torch.cos, torch.sin))
    k, v = (torch.full((kv_heads, slots, width), NAN, dtype=dtype, device=device) for _ in range(2))
    where = torch.tensor([7, 0, -1, 3], device=device)
    q = rope_store(qkv, cos, sin, where, k, v, heads)
    given = qkv.double().cpu().view(rows, -1, width)
    own_q, own_k, own_v = given.split([heads, kv_heads, kv_heads], 1)
    turned_q, turned_k = (turned(own, cos.double().cpu(), sin.double().cpu()) for own in (own_q, own_k))
    close(q, turned_q)
    stored = [0, 1, 3]  # the third row is padding
    close(k[:, where[stored]].transpose(0, 1), turned_k[stored])
    close(v[:, where[stored]].transpose(0, 1), own_v[stored])
    untouched = [slot for slot in range(slots) if slot not in (7, 0, 3)]
    assert torch.isnan(k[:, untouched]).all()
    assert torch.isnan(v[:, untouched]).all()


@pytest.mark.parametrize(("out", "width", "rank"), [(40, 96, 5), (33, 70, 16)])
def test_dora_norms(out: int, width: int, rank: int, dtype: torch.dtype, device: str, close: Close) -> None:
    weight, a, b = (torch.randn(*s).to(dtype).to(device) for s in [(out, width), (rank, width), (rank, out)])
    meant = (weight.double() + b.double().T @ a.double()).norm(dim=1)
    close(row_norms(weight, a, b), meant)


def test_shapes_that_do_not_fit_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="does not hold 3 query and 1 key heads of 16"):
        k = torch.zeros(1, 4, 16, device=device)
        rope_store(torch.zeros(1, 96, device=device), k[0, :1], k[0, :1], torch.zeros(1, device=device), k, k, 3)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.zeros(4, 8, device=device).T, torch.ones(4, device=device), 1e-5)
    with pytest.raises(ValueError, match="for a weight"):
        row_norms(torch.zeros(4, 8, device=device), torch.zeros(2, 8, device=device), torch.zeros(3, 4, device=device))
