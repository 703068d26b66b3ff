"""Confidence intervals by resampling the examples: how far a score would move on another draw of questions.

The percentile bootstrap (Efron 1979) over examples. It covers which questions were asked, not the seed of the training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from training.metrics import Floats, Measured

RESAMPLES: Final = 1000
_SHARE: Final = 0.95
# A block of resamples at a time: the weights of one take 8 bytes × resamples × examples.
_BLOCK: Final = 100


@dataclass(frozen=True)
class Interval:
    """The middle 95 % of what resamples give."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def interval(measured: Measured, seed: int, resamples: int = RESAMPLES) -> Interval:
    """The interval of one score. Equal seeds draw equal questions, whatever is measured on them."""
    return middle(resampled(measured, seed, resamples))


def interval_of_difference(measured: Measured, other: Measured, seed: int, resamples: int = RESAMPLES) -> Interval:
    """The interval of `measured` minus `other`, paired: both on the same questions, drawn again and again."""
    assert len(measured.counts) == len(other.counts)
    return middle(resampled(measured, seed, resamples) - resampled(other, seed, resamples))


def resampled(measured: Measured, seed: int, resamples: int) -> Floats:
    """The score on `resamples` draws of the examples; equal seeds draw equal examples, whatever is measured."""
    generator = np.random.default_rng(seed)
    count = len(measured.counts)
    scores = []
    for start in range(0, resamples, _BLOCK):
        block = min(_BLOCK, resamples - start)
        times_drawn = generator.multinomial(count, np.full(count, 1 / count), size=block).astype(np.float64)
        scores.append(measured.of_totals(times_drawn @ measured.counts))
    return np.concatenate(scores)


def middle(scores: Floats) -> Interval:
    """The interval that holds the middle 95 % of resampled scores."""
    low, high = np.quantile(scores, [(1 - _SHARE) / 2, (1 + _SHARE) / 2])
    return Interval(float(low), float(high))
