"""Examples of what the base can do already, mixed in so that it stays able to."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.data import Example
from training.errors import DataTooSmall


@dataclass(frozen=True)
class SkillData:
    """Where they come from, and how many."""

    file: Path  # chat JSONL
    share: float  # of all examples trained on, in (0, 1)


def mix_in(
    training: Sequence[Example], skills: Sequence[Example], share: float, seed: int, held: Sequence[Example] = ()
) -> tuple[Example, ...]:
    """`training` and so many of `skills`, drawn without repetition, that they are `share` of all.

    Questions that are in `held` (the validation set) are not drawn. Raises `DataTooSmall` where there are too few.
    """
    asked = {example.prompt for example in held}
    fit = [example for example in skills if asked.isdisjoint(example.questions)]
    wanted = max(1, round(len(training) * share / (1 - share)))
    if len(fit) < wanted:
        largest = len(fit) / (len(fit) + len(training))
        raise DataTooSmall(
            f"a share of {share:g} beside {len(training)} examples takes {wanted} skill examples, and there are "
            f"{len(fit)}: give more" + (f", or --skill-share {_rounded_down(largest):g}" if fit else "")
        )
    return (*training, *random.Random(seed).sample(fit, wanted))


def _rounded_down(share: float) -> float:
    """To three digits, so that what is advised is never more than there is."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 2)
    return math.floor(share / unit) * unit
