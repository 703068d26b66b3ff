"""Texts that are nearly the same: MinHash proposes pairs, the exact Jaccard similarity of their shingles decides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

SHINGLE_CHARS: Final = 5
_PERMUTATIONS: Final = 128
# The index is asked for less similar pairs than wanted: at its own threshold it misses half of them, this far above
# it next to none, and what it proposes beyond that costs only a comparison.
_SLACK: Final = 0.25
_SEED: Final = 1

Shingles = frozenset[str]


@dataclass(frozen=True)
class Pair:
    """A text and an earlier (or other) one that it resembles most."""

    index: int
    other: int
    similarity: float  # Jaccard, 0…1


def shingles(text: str) -> Shingles:
    """All runs of five characters, in lower case, of letters and digits with one blank between words.

    A text too short for one run is its own shingle.
    """
    plain = re.sub(r"[\W_]+", " ", text.lower()).strip() or text.strip()
    return frozenset(plain[at : at + SHINGLE_CHARS] for at in range(max(1, len(plain) - SHINGLE_CHARS + 1)))


def similarity(first: Shingles, second: Shingles) -> float:
    """Jaccard: common shingles by all shingles."""
    union = len(first | second)
    return len(first & second) / union if union else 1.0


def near_copies(texts: Sequence[str], threshold: float) -> list[Pair]:
    """Each text that is at least `threshold` similar to an earlier one that is itself no copy."""
    index = _Index(threshold)
    found = []
    for position, text in enumerate(texts):
        read = _Read(text)
        nearest = index.nearest(position, read)
        if nearest is None:
            index.add(position, read)
        else:
            found.append(nearest)
    return found


def near_matches(texts: Sequence[str], others: Sequence[str], threshold: float) -> list[Pair]:
    """Each of `texts` that is at least `threshold` similar to one of `others`."""
    index = _Index(threshold)
    for position, text in enumerate(others):
        index.add(position, _Read(text))
    found = (index.nearest(position, _Read(text)) for position, text in enumerate(texts))
    return [pair for pair in found if pair is not None]


class _Read:
    """A text's shingles and their sketch."""

    def __init__(self, text: str) -> None:
        from datasketch import MinHash

        self.shingles = shingles(text)
        self.sketch = MinHash(num_perm=_PERMUTATIONS, seed=_SEED)
        self.sketch.update_batch([part.encode() for part in sorted(self.shingles)])


class _Index:
    """Texts by MinHash bands."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self._threshold = threshold
        self._bands = MinHashLSH(threshold=max(0.1, threshold - _SLACK), num_perm=_PERMUTATIONS)
        self._shingles: dict[int, Shingles] = {}

    def add(self, position: int, read: _Read) -> None:
        """Keep the text under its position."""
        self._shingles[position] = read.shingles
        self._bands.insert(position, read.sketch)

    def nearest(self, position: int, read: _Read) -> Pair | None:
        """The most similar text kept, the earliest of equals; None when none is similar enough."""
        candidates = self._bands.query(read.sketch)
        scored = [(similarity(read.shingles, self._shingles[other]), -other) for other in candidates]
        best, negative = max(scored, default=(0.0, 0))
        return Pair(position, -negative, best) if best >= self._threshold else None
