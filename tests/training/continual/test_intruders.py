"""Intruder dimensions against brute force, planted ones, and random deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from training.base_weights import matrices
from training.continual import intruders
from training.continual.factors import Pair, compressed, relative_difference
from training.continual.intruders import count, intruding, random_like, reduce, strongest
from training.errors import WeightsMissing


def brute(weight: torch.Tensor, pair: Pair, top: int = 10, epsilon: float = 0.5) -> int:
    """The definition, word for word, in float64 numpy."""
    w = weight.double().numpy()
    base = np.linalg.svd(w, full_matrices=False)[0]
    adapted = np.linalg.svd(w + pair.b.double().numpy() @ pair.a.double().numpy(), full_matrices=False)[0]
    return sum(bool(np.abs(base.T @ adapted[:, j]).max() < epsilon) for j in range(min(top, min(w.shape))))


def falling(out: int, inner: int, seed: int) -> torch.Tensor:
    """A matrix whose singular values fall like a model's."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(out, min(out, inner), generator=generator))[0]
    v = torch.linalg.qr(torch.randn(inner, min(out, inner), generator=generator))[0]
    s = 10.0 / (1 + torch.arange(min(out, inner))) ** 0.5
    return (u * s) @ v.T


def drawn(out: int, inner: int, rank: int, size: float, seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    pair = Pair(torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator))
    return Pair(pair.a, pair.b * size / pair.norm())


@pytest.mark.parametrize("shape", [(96, 96), (160, 90), (90, 160), (12, 40)])
@pytest.mark.parametrize("size", [0.02, 0.3, 1.0, 4.0])
def test_counts_are_those_of_the_definition(shape: tuple[int, int], size: float) -> None:
    seed = int(np.random.default_rng().integers(1 << 30))
    weight = falling(*shape, seed)
    pair = drawn(*shape, 4, size * float(weight.norm()) / 4, seed + 1)
    [site] = count([("m", weight)], {"x": {"m": pair}})["x"]
    assert site.intruders == brute(weight, pair), seed
    assert site.relative_norm == pytest.approx(float(pair.delta().norm() / weight.norm()), rel=1e-4)
    assert site.random == brute(weight, random_like(pair, "0:m")), seed


def test_strongest_vectors_are_the_svds(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, pair = falling(120, 100, 3), drawn(120, 100, 4, 9.0, 4)
    monkeypatch.setattr(intruders, "_whole", None)  # the iteration has to settle by itself
    found = strongest(weight, pair)
    u, s, vt = torch.linalg.svd(weight + pair.delta())
    assert torch.allclose(found.s, s[:10], rtol=1e-4)
    for k in range(10):
        assert abs(float(found.u[:, k] @ u[:, k])) > 0.999 and abs(float(found.v[:, k] @ vt[k])) > 0.999


def test_a_planted_intruder_is_found_and_taken_out() -> None:
    """One strong direction made of many of the base's, so that it is like none of them."""
    weight = falling(80, 60, 5)
    u, _, vt = torch.linalg.svd(weight, full_matrices=False)
    planted = u[:, 20:50].sum(1) / 30**0.5
    quiet = drawn(80, 60, 3, 0.01, 6)
    loud = Pair(torch.cat([quiet.a, vt[25:26]]), torch.cat([quiet.b, 25 * planted[:, None]], 1))
    assert [one.intruders for one in count([("m", weight)], {"x": {"m": quiet}})["x"]] == [0]
    assert [one.intruders for one in count([("m", weight)], {"x": {"m": loud}})["x"]] == [1]
    for share in (0.25, 1.0):
        done = reduce([("m", weight)], {"m": loud}, share)
        found = strongest(weight, loud)
        [which] = intruding(u, found)
        wanted = loud.delta() - share * found.s[which] * torch.outer(found.u[:, which], found.v[:, which])
        assert done.removed == 1 and done.factors["m"].rank == 4
        near = torch.linalg.svd(wanted)
        best = (near.U[:, :4] * near.S[:4]) @ near.Vh[:4]
        assert torch.allclose(done.factors["m"].delta(), best, atol=1e-3)
        assert done.error == pytest.approx(float(near.S[4:].norm() / near.S.norm()), abs=1e-3)
    assert [one.intruders for one in count([("m", weight)], {"x": done.factors})["x"]] == [0]


def test_nothing_is_touched_where_there_is_no_intruder() -> None:
    weight, pair = falling(40, 40, 7), drawn(40, 40, 4, 0.05, 8)
    assert reduce([("m", weight)], {"m": pair}, 1.0).factors["m"] is pair
    loud = drawn(40, 40, 4, 200.0, 9)
    assert reduce([("m", weight)], {"m": loud}, 0.0).factors["m"] is loud
    assert reduce([("m", weight)], {"m": loud}, 1.0).removed > 0


def test_the_control_has_the_norm_and_the_rank() -> None:
    pair = drawn(30, 20, 5, 3.0, 1)
    control = random_like(pair, "seed")
    assert control.norm() == pytest.approx(pair.norm(), rel=1e-5) and control.rank == 5
    assert torch.equal(control.b, random_like(pair, "seed").b)
    assert not torch.equal(control.b, random_like(pair, "other").b)


def test_peft_keeps_what_it_says_it_subtracts() -> None:
    """Why the reduction is ours: PEFT's λ = 1 leaves an intruder as it is. Fails when PEFT mends it."""
    import inspect

    from peft.tuners.lora.intruders import reduce_intruder_dimension

    source, words = inspect.getsource(reduce_intruder_dimension), reduce_intruder_dimension.__doc__ or ""
    assert "(mitigation_lambda - 1)" in source and "the more of the intruder dimension is subtracted" in words


def test_compression_is_the_best_there_is() -> None:
    pair = drawn(30, 20, 8, 3.0, 1)
    near, error = compressed(pair, 3)
    u, s, vt = torch.linalg.svd(pair.delta())
    assert torch.allclose(near.delta(), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    assert error == pytest.approx(float(s[3:].norm() / s.norm()), rel=1e-4)
    same, error = compressed(pair, 8)
    assert relative_difference({"m": pair}, {"m": same}) < 1e-5 and error < 1e-6


def test_the_bases_matrices_come_from_its_files(tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj"
    [(module, weight)] = matrices(tiny_base, [name])
    assert module == name and torch.equal(weight, model.get_submodule(name).weight)
    with pytest.raises(WeightsMissing, match=r"layers\.9"):
        list(matrices(tiny_base, ["model.layers.9.mlp.up_proj"]))
