"""Texts that are nearly the same: MinHash proposes pairs, the exact Jaccard similarity of their shingles decides.

What many texts all begin or end with, an instruction as a rule, is left out before: it tells nothing apart, and where
it is long it makes any two of them alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

SHINGLE_CHARS: Final = 5
_PERMUTATIONS: Final = 128
# The index is asked for less similar pairs than wanted: at its own threshold it misses half of them, this far above
# it next to none, and what it proposes beyond that costs only a comparison.
_SLACK: Final = 0.25
_SEED: Final = 1
# By how much the share of equal entries in two sketches may fall short of the similarity: four deviations, nearly.
_ESTIMATE_SLACK: Final = 0.1
_FEWEST_FRAMED: Final = 16  # texts; of fewer, what they share may be what makes them near duplicates
_OPENING_CHARS: Final = 40  # of an instruction: many texts that share them are worded by one
_SYMBOLS: Final = frozenset("*/%#@&\\")  # beside what Unicode calls symbols: + < = > $ € ^ | ~ and emoji

Shingles = frozenset[str]
Counted = Callable[[int], object]  # told how many texts were looked at


@dataclass(frozen=True)
class Pair:
    """A text and an earlier (or other) one that it resembles most."""

    index: int
    other: int
    similarity: float  # Jaccard, 0…1


def shingles(text: str) -> Shingles:
    """All runs of five characters, in lower case, of letters, digits and symbols with one blank between words.

    Punctuation is left out, and a hyphen within a word. A text too short for one run is its own shingle.
    """
    plain = re.sub(r"[\W_]+", _symbols, text.lower()).strip() or text.strip()
    return frozenset(plain[at : at + SHINGLE_CHARS] for at in range(max(1, len(plain) - SHINGLE_CHARS + 1)))


def _symbols(between: re.Match[str]) -> str:
    """What stands between two words, without its punctuation."""
    run = between[0]
    kept = [
        mark for mark in run if mark in _SYMBOLS or unicodedata.category(mark)[0] == "S" or (mark == "-" and run != "-")
    ]
    return " ".join(["", *kept, ""]) if kept else " "


def similarity(first: Shingles, second: Shingles) -> float:
    """Jaccard: common shingles by all shingles."""
    common = len(first & second)
    union = len(first) + len(second) - common
    return common / union if union else 1.0


def near_copies(
    texts: Sequence[str],
    threshold: float,
    kinds: Sequence[Hashable] = (),
    apart: Sequence[Hashable] = (),
    counted: Counted = lambda done: None,
) -> list[Pair]:
    """Each text that is at least `threshold` similar to an earlier one that is itself no copy.

    With `kinds`, one of each text, only texts of one kind are copies of each other; a text that is similar to none of
    its kind is paired with the one of another kind that it resembles most. Texts with unlike `apart` are not compared.
    """
    kinds = kinds or [None] * len(texts)
    found = []
    done = 0
    for places, bare in _framed(texts, apart):
        index = _Index(threshold)
        for position, text in zip(places, bare, strict=True):
            read = _Read(text)
            similar = index.similar(read)
            own = [pair for pair in similar if kinds[pair[1]] == kinds[position]]
            if similar:
                found.append(_nearest(position, own or similar))
            if not own:
                index.add(position, read)
            done += 1
            counted(done)
    return sorted(found, key=lambda pair: pair.index)


def near_matches(
    texts: Sequence[str], others: Sequence[str], threshold: float, counted: Counted = lambda done: None
) -> list[Pair]:
    """Each of `texts` that is at least `threshold` similar to one of `others`."""
    found = []
    done = 0
    for places, bare in _framed([*others, *texts]):  # others come first, here and in each frame
        index = _Index(threshold)
        for position, text in zip(places, bare, strict=True):
            if position < len(others):
                index.add(position, _Read(text))
                continue
            if similar := index.similar(_Read(text)):
                found.append(_nearest(position - len(others), similar))
            done += 1
            counted(done)
    return sorted(found, key=lambda pair: pair.index)


def _framed(texts: Sequence[str], apart: Sequence[Hashable] = ()) -> Iterator[tuple[list[int], list[str]]]:
    """(places, the texts there without what they share) of each set of texts that are to be compared.

    Many texts that open alike have one instruction, and are compared with each other alone.
    """
    keys = [(apart[place] if apart else None, text[:_OPENING_CHARS]) for place, text in enumerate(texts)]
    often = Counter(keys)
    sets: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        sets.setdefault(key if often[key] >= _FEWEST_FRAMED else key[0], []).append(place)
    for places in sets.values():
        yield places, unframed([texts[place] for place in places])


def unframed(texts: Sequence[str]) -> list[str]:
    """The texts without the whole words that all of them begin with, and without those that all end with."""
    if len(texts) < _FEWEST_FRAMED:
        return list(texts)
    start = _shared(min(texts), max(texts))
    rest = [text[start:] for text in texts]
    turned = [text[::-1] for text in rest]
    end = _shared(min(turned), max(turned))
    return [text[: len(text) - end] for text in rest]


def _shared(first: str, last: str) -> int:
    """How many characters two texts have in common at their beginnings, back to the last blank."""
    most = min(len(first), len(last))
    count = next((at for at in range(most) if first[at] != last[at]), most)
    while count and not first[count - 1].isspace():
        count -= 1
    return count


def _nearest(position: int, similar: Sequence[tuple[float, int]]) -> Pair:
    """The most similar text, the earliest of equals."""
    best, other = max(similar, key=lambda pair: (pair[0], -pair[1]))
    return Pair(position, other, best)


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
        self._kept: list[tuple[int, Shingles]] = []  # (position, shingles)
        self._sketches = np.empty((64, _PERMUTATIONS), np.uint64)  # rows as in `_kept`, and room for more

    def add(self, position: int, read: _Read) -> None:
        """Keep the text under its position."""
        row = len(self._kept)
        if row == len(self._sketches):
            self._sketches = np.concatenate([self._sketches, np.empty_like(self._sketches)])
        self._sketches[row] = read.sketch.hashvalues
        self._kept.append((position, read.shingles))
        self._bands.insert(row, read.sketch)

    def similar(self, read: _Read) -> list[tuple[float, int]]:
        """(similarity, position) of every text kept that is similar enough."""
        rows = np.array(self._bands.query(read.sketch), np.int64)
        estimates = (self._sketches[rows] == read.sketch.hashvalues).mean(axis=1)
        likely = [self._kept[row] for row in rows[estimates >= self._threshold - _ESTIMATE_SLACK]]
        scored = [(similarity(read.shingles, other), position) for position, other in likely]
        return [pair for pair in scored if pair[0] >= self._threshold]
