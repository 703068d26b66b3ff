"""What holds an adapter's factors back while they are trained: rows that stay, subspaces to avoid or to keep out of.

The rules act on two parameters, a [r, in] and b [out, r], of whatever model they sit in, through gradient hooks and a
projection before each forward; the trainer need not know of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.continual.factors import Pair


@dataclass(frozen=True)
class SiteRule:
    """The rules of one matrix."""

    frozen: int = 0  # so many first rows of a, and columns of b, keep their values
    avoid: Tensor | None = None  # [n, in]: earlier rows of a; the new ones pay for every overlap with them
    avoid_weight: float = 0.0
    left: Tensor | None = None  # [out, k], orthonormal: the new columns of b stay orthogonal to these
    right: Tensor | None = None  # [in, k], orthonormal: the new rows of a stay orthogonal to these
    still: bool = False  # all rows of a keep their values: only the new columns of b are trained

    def penalty(self, a: Tensor) -> Tensor:
        """`avoid_weight` · ‖a_new avoidᵀ‖², what is added to the loss of an optimizer step."""
        if self.avoid is None:
            return a.new_zeros(())
        return self.avoid_weight * (a[self.frozen :] @ self.avoid.to(a).T).square().sum()


def govern(a: nn.Parameter, b: nn.Parameter, rule: SiteRule, steps: int = 1) -> Callable[[], None]:
    """Put `rule` on the gradients of `a` and `b`; returns what puts their values where the rule allows.

    The result is called before each forward, because optimizers with a step of their own for every element (Adam)
    leave a subspace even when all gradients lie in it, and after the last step. `steps` is the number of backward
    passes in one optimizer step, over which the penalty is spread. Weight decay is not a gradient: frozen rows need an
    optimizer without it, or they are only put back at the next forward.
    """
    rows = len(a) if rule.still else rule.frozen
    kept_a, kept_b = a.detach()[:rows].clone(), b.detach()[:, : rule.frozen].clone()

    def on_a(gradient: Tensor) -> Tensor:
        new = gradient.clone()
        if rule.still:
            return new.zero_()
        if rule.avoid is not None:
            avoid = rule.avoid.to(a)
            overlap = a.detach()[rule.frozen :] @ avoid.T  # [r_new, n]
            new[rule.frozen :] += (2 * rule.avoid_weight / steps) * (overlap @ avoid)
        new[: rule.frozen] = 0
        if rule.right is not None:
            new[rule.frozen :] = _out_of(new[rule.frozen :].T, rule.right.to(new)).T
        return new

    def on_b(gradient: Tensor) -> Tensor:
        new = gradient.clone()
        new[:, : rule.frozen] = 0
        if rule.left is not None:
            new[:, rule.frozen :] = _out_of(new[:, rule.frozen :], rule.left.to(new))
        return new

    def settle() -> None:
        with torch.no_grad():
            if rows:
                a.data[:rows] = kept_a.to(a)
            if rule.frozen:
                b.data[:, : rule.frozen] = kept_b.to(b)
            if rule.right is not None:
                a.data[rule.frozen :] = _out_of(a.data[rule.frozen :].T, rule.right.to(a)).T
            if rule.left is not None:
                b.data[:, rule.frozen :] = _out_of(b.data[:, rule.frozen :], rule.left.to(b))

    a.register_hook(on_a)  # type: ignore[no-untyped-call]
    b.register_hook(on_b)  # type: ignore[no-untyped-call]
    return settle


def held(pair: Pair, start: Pair | None, rule: SiteRule) -> Pair:
    """Trained factors with `rule` kept exactly: `start`'s frozen rows bit for bit, the new ones projected."""
    a, b = pair.a.clone(), pair.b.clone()
    if start is not None and (rule.frozen or rule.still):
        rows = len(start.a) if rule.still else rule.frozen
        a[:rows], b[:, : rule.frozen] = start.a[:rows], start.b[:, : rule.frozen]
    if rule.right is not None:
        a[rule.frozen :] = _out_of(a[rule.frozen :].T, rule.right).T
    if rule.left is not None:
        b[:, rule.frozen :] = _out_of(b[:, rule.frozen :], rule.left)
    return Pair(a, b)


def _out_of(columns: Tensor, basis: Tensor) -> Tensor:
    """`columns` [n, m] without their parts in the span of `basis` [n, k]."""
    return columns - basis @ (basis.T @ columns)
