"""Intruder dimensions: strong directions of an adapted matrix that the base's matrix does not have.

Shuttleworth et al. 2024, arXiv:2410.21228: of the k strongest left singular vectors of W + ΔW, those whose largest
|cosine| with any left singular vector of W lies below ε. The count grows with ‖ΔW‖ alone, whatever its direction, so it
always comes with ‖ΔW‖/‖W‖ and with the count of a random delta of the same rank and norm.

The base's SVD is made once for any number of adapters. The k strongest vectors of W + b a come from a block iteration
that applies W and the factors apart, begun in the base's own strongest directions and b's; where it does not settle, a
whole SVD is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from training.continual.factors import Factors, Pair, compressed

TOP: Final = 10
EPSILON: Final = 0.5
_SPARE = 10  # more vectors than asked for, so that the last ones settle
_ROUNDS = 60
_SETTLED = 1e-4  # residual of a singular triple, relative to the largest singular value


@dataclass(frozen=True)
class SiteIntruders:
    """What one adapter does to one matrix."""

    module: str
    intruders: int  # of TOP
    random: int  # the same for a random delta of equal rank and norm
    relative_norm: float  # ‖ΔW‖ / ‖W‖


@dataclass(frozen=True)
class Top:
    """The strongest singular triples of a matrix [out, in]."""

    u: Tensor  # [out, k]
    s: Tensor  # [k], falling
    v: Tensor  # [in, k]


def count(
    weights: Iterable[tuple[str, Tensor]], adapters: Mapping[str, Factors], seed: int = 0,
    top: int = TOP, epsilon: float = EPSILON,
) -> dict[str, list[SiteIntruders]]:  # fmt: skip
    """Intruders of each adapter, matrix by matrix.

    `weights` are the base's matrices by module; those that no adapter adapts are passed over without an SVD.
    """
    found: dict[str, list[SiteIntruders]] = {name: [] for name in adapters}
    for module, weight in weights:
        asked = {name: factors[module] for name, factors in adapters.items() if module in factors}
        if not asked:
            continue
        weight = weight.float()
        base = torch.linalg.svd(weight, full_matrices=False)[0]
        norm = float(weight.norm())
        for name, pair in asked.items():
            control = random_like(pair, f"{seed}:{module}")
            found[name].append(
                SiteIntruders(
                    module,
                    len(intruding(base, strongest(weight, pair, top, base), epsilon)),
                    len(intruding(base, strongest(weight, control, top, base), epsilon)),
                    pair.norm() / norm,
                )
            )
    return found


def intruding(base: Tensor, top: Top, epsilon: float = EPSILON) -> list[int]:
    """Which of the strongest vectors are like none of `base`'s left singular vectors [out, min(out, in)]."""
    alike = (base.T @ top.u).abs().amax(dim=0)
    return [index for index, cosine in enumerate(alike.tolist()) if cosine < epsilon]


def strongest(weight: Tensor, pair: Pair, top: int = TOP, begin: Tensor | None = None) -> Top:
    """The `top` strongest singular triples of `weight` + pair; `begin` [out, n] holds directions to begin with."""
    narrow = min(weight.shape)
    width = min(narrow, top + _SPARE + pair.rank)
    if 2 * width >= narrow:
        return _whole(weight, pair, top)
    if begin is None:
        begin = torch.randn(weight.shape[0], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(torch.cat([pair.b, begin], 1)[:, :width])[0]
    for _ in range(_ROUNDS):
        right, _ = torch.linalg.qr(_transposed(weight, pair, basis))
        image = _times(weight, pair, right)
        u, s, vt = torch.linalg.svd(image, full_matrices=False)
        v = right @ vt.T
        residual = (_transposed(weight, pair, u[:, :top]) - v[:, :top] * s[:top]).norm(dim=0).max()
        if float(residual) <= _SETTLED * float(s[0]):
            return Top(u[:, :top], s[:top], v[:, :top])
        basis = u
    return _whole(weight, pair, top)


def random_like(pair: Pair, seed: str) -> Pair:
    """A random delta of the same shapes, rank and norm; the same for the same seed."""
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
    drawn = Pair(torch.randn(pair.a.shape, generator=generator), torch.randn(pair.b.shape, generator=generator))
    return Pair(drawn.a, drawn.b * (pair.norm() / max(drawn.norm(), 1e-30)))


@dataclass(frozen=True)
class Reduced:
    """An adapter without (some of) its intruders."""

    factors: dict[str, Pair]
    removed: int  # intruders found and reduced, all modules together
    error: float  # ‖what keeping the rank cost‖ / ‖the reduced ΔW‖, of the worst module


def reduce(
    weights: Iterable[tuple[str, Tensor]], factors: Factors, share: float, top: int = TOP, epsilon: float = EPSILON
) -> Reduced:
    """Take `share` (0…1) of every intruder σ u vᵀ out of W + ΔW, then bring each delta back to its rank.

    Share 1 removes intruders altogether, 0 changes nothing. The paper's λ is what stays, 1 - share. PEFT's
    `reduce_intruder_dimension` says of its λ that it is what is subtracted, and subtracts 1 - λ; it also takes the SVD
    of the stored weight, which of an NF4 base is packed bytes. `weights` here are the base's own matrices, see
    `training.base_weights`. Modules without intruders keep their factors bit for bit.
    """
    changed: dict[str, Pair] = {}
    removed, worst = 0, 0.0
    for module, weight in weights:
        if module not in factors:
            continue
        pair, weight = factors[module], weight.float()
        base = torch.linalg.svd(weight, full_matrices=False)[0]
        found = strongest(weight, pair, top, base)
        which = intruding(base, found, epsilon)
        if not which or share == 0:
            continue
        removed += len(which)
        u, s, v = found.u[:, which], found.s[which], found.v[:, which]
        grown = Pair(torch.cat([pair.a, v.T]), torch.cat([pair.b, -share * u * s], 1))
        changed[module], error = compressed(grown, pair.rank)
        worst = max(worst, error)
    return Reduced({**factors, **changed}, removed, worst)


def totals(sites: Iterable[SiteIntruders]) -> Iterator[tuple[str, int, int, float]]:
    """(layer, intruders, those of the random control, mean ‖ΔW‖/‖W‖) by layer, in order."""
    layers: dict[str, list[SiteIntruders]] = {}
    for site in sites:
        layers.setdefault(layer_of(site.module), []).append(site)
    for layer in sorted(layers, key=lambda name: (len(name), name)):
        here = layers[layer]
        mean = sum(site.relative_norm for site in here) / len(here)
        yield layer, sum(site.intruders for site in here), sum(site.random for site in here), mean


def layer_of(module: str) -> str:
    """The number of the layer a module sits in; the module itself where it is in none."""
    return next((part for part in module.split(".") if part.isdigit()), module)


def _times(weight: Tensor, pair: Pair, right: Tensor) -> Tensor:
    return weight @ right + pair.b @ (pair.a @ right)


def _transposed(weight: Tensor, pair: Pair, left: Tensor) -> Tensor:
    return weight.T @ left + pair.a.T @ (pair.b.T @ left)


def _whole(weight: Tensor, pair: Pair, top: int) -> Top:
    u, s, vt = torch.linalg.svd(weight + pair.delta(), full_matrices=False)
    return Top(u[:, :top], s[:top], vt[:top].T)
