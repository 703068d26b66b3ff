"""The replay memory: a uniform sample of everything learned so far, the same however often a run is repeated.

Every example gets a pseudo-random key from the seed and its own text; the memory holds those with the smallest keys.
That is a uniform sample without replacement of all examples seen, it can be kept up to date from the old memory and the
new examples alone, and neither the order of arrival nor a restart changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeVar


class Line(Protocol):
    """What can be kept: `training.data.Example`, or a test's stand-in."""

    def as_line(self) -> str:
        """Its text; equal texts are one example."""
        ...


E = TypeVar("E", bound=Line)


def remember(memory: Sequence[E], new: Sequence[E], capacity: int, seed: int) -> tuple[E, ...]:
    """The memory after `new` examples: at most `capacity`, in the order of their keys."""
    return sample((*memory, *new), capacity, f"keep:{seed}")


def draw(memory: Sequence[E], share: float, own: int, seed: int, stage: int) -> tuple[E, ...]:
    """Examples of the memory to mix with `own` new ones, so that they are `share` of all.

    As many as there are where the memory is too small: nothing is repeated. Each stage draws anew.
    """
    wanted = round(own * share / (1 - share))
    return sample(memory, wanted, f"draw:{seed}:{stage}")


def sample(examples: Sequence[E], count: int, salt: str) -> tuple[E, ...]:
    """A uniform sample of at most `count` different examples, the same for equal `salt` and examples in any order."""
    keyed = {hashlib.sha256(f"{salt}:{one.as_line()}".encode()).digest(): one for one in examples}
    return tuple(keyed[key] for key in sorted(keyed)[:count])
