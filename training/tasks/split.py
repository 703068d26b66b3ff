"""Deterministic disjoint sampling: by hash, not by a generator, so that the result depends on nothing but the data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from training.errors import DataTooSmall

T = TypeVar("T")
RANKS = 2**64
_EVALUATION_SHARE = 0.2  # of the groups


def rank(seed: int, *parts: str) -> int:
    """A number in 0…RANKS that is uniform over `parts` and fixed for them."""
    return int.from_bytes(hashlib.sha256("\0".join((str(seed), *parts)).encode()).digest()[:8], "big")


def is_held(seed: int, group: str) -> bool:
    """Whether a group belongs to the evaluation."""
    return rank(seed, "group", group) < _EVALUATION_SHARE * RANKS


def split_by_group(
    items: Sequence[T],
    *,
    group: Callable[[T], str],
    identity: Callable[[T], str],
    train: int,
    evaluation: int,
    seed: int,
) -> tuple[list[T], list[T]]:
    """Sample `train` and `evaluation` items whose groups do not meet.

    `identity` tells items of a group apart. Raises `DataTooSmall` when a side has too few.
    """
    held = [item for item in items if is_held(seed, group(item))]
    rest = [item for item in items if not is_held(seed, group(item))]
    return _sample(rest, identity, train, seed, "training"), _sample(held, identity, evaluation, seed, "evaluation")


def _sample(items: list[T], identity: Callable[[T], str], wanted: int, seed: int, what: str) -> list[T]:
    if wanted > len(items):
        raise DataTooSmall(f"the source has {len(items)} examples for {what}, {wanted} were asked for")
    return sorted(items, key=lambda item: rank(seed, "item", identity(item)))[:wanted]
