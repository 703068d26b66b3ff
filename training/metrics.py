"""Scores as functions of summed per-example counts, so that any resample of the examples can be scored again for free.

    score(examples) = of_totals( sum over examples of counts[example] )

Accuracy counts (right, 1); macro-F1 counts hits, wanted and given for each class; BLEU counts matching and possible
n-grams and lengths; a mean counts (value, 1). None is an average of averages, so each equals what its library computes
on the whole set, and the bootstrap (`training.bootstrap`) is one matrix product.
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Pair = tuple[str, str]  # where in a record, and the value there as text

_BLEU_ORDER: Final = 4
# First and last characters of scripts written without blanks between words. Korean has blanks, Tibetan marks syllables.
_UNSPACED: Final = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x19E0, 0x19FF),  # Khmer symbols
    (0x2E80, 0x2FDF),  # parts of Chinese characters
    (0x3005, 0x30FF),  # kana
    (0x31F0, 0x31FF),  # kana
    (0x3400, 0x4DBF),  # Chinese characters
    (0x4E00, 0x9FFF),  # Chinese characters
    (0xA9E0, 0xA9FF),  # Myanmar
    (0xAA60, 0xAA7F),  # Myanmar
    (0xF900, 0xFAFF),  # Chinese characters
    (0xFF66, 0xFF9F),  # kana
    (0x20000, 0x3FFFD),  # Chinese characters
)


@dataclass(frozen=True)
class Measured:
    """One metric of one model's answers."""

    counts: Floats = field(repr=False)  # [examples, kinds]
    of_totals: Callable[[Floats], Floats] = field(repr=False)  # [..., kinds] of sums → [...] of scores

    @property
    def value(self) -> float:
        """The score over all examples."""
        return float(self.of_totals(self.counts.sum(axis=0)))


def mean(values: Sequence[float | bool], weights: Sequence[float | bool] | None = None) -> Measured:
    """The (weighted) mean; 0 where nothing has weight. Accuracy and rates are means of truth values."""
    weight = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    return Measured(np.stack([np.asarray(values, np.float64) * weight, weight], axis=1), _first_by_second)


def accuracy(wanted: Sequence[object], given: Sequence[object]) -> Measured:
    """Share of answers equal to what was wanted."""
    return mean([a == b for a, b in zip(wanted, given, strict=True)])


def macro_f1(wanted: Sequence[str], given: Sequence[str | None], labels: Sequence[str]) -> Measured:
    """Mean F1 of the classes that occur in `wanted`; an answer outside `labels` is wrong for all of them."""
    columns = []
    for label in labels:
        is_wanted = np.array([one == label for one in wanted], np.float64)
        is_given = np.array([one == label for one in given], np.float64)
        columns += [is_wanted * is_given, is_wanted, is_given]

    def of_totals(totals: Floats) -> Floats:
        hits, in_wanted, in_given = (totals[..., kind::3] for kind in range(3))
        each = 2 * hits / np.maximum(in_wanted + in_given, 1)
        occurs = in_wanted > 0
        scores: Floats = (each * occurs).sum(axis=-1) / np.maximum(occurs.sum(axis=-1), 1)
        return scores

    return Measured(np.stack(columns, axis=1), of_totals)


def micro_f1(wanted: Sequence[Iterable[Hashable]], given: Sequence[Iterable[Hashable]]) -> Measured:
    """F1 over all things of all examples together, sets or counts; 1 where nothing was wanted and nothing given."""
    counted = [(Counter(w), Counter(g)) for w, g in zip(wanted, given, strict=True)]
    rows = [((w & g).total(), w.total(), g.total()) for w, g in counted]

    def of_totals(totals: Floats) -> Floats:
        hits, both = totals[..., 0], totals[..., 1] + totals[..., 2]
        scores: Floats = np.where(both > 0, 2 * hits / np.maximum(both, 1), 1.0)
        return scores

    return Measured(np.array(rows, np.float64).reshape(-1, 3), of_totals)


def rouge_l(wanted: Sequence[str], given: Sequence[str], weights: Sequence[float | bool] | None = None) -> Measured:
    """Mean ROUGE-L F-measure: on ASCII text rouge-score's with its stemming, on any other over `Words`."""
    return mean(rouge_l_each(wanted, given), weights)


def rouge_l_each(wanted: Sequence[str], given: Sequence[str]) -> list[float]:
    """ROUGE-L of each answer."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return [float(scorer.score(w, g)["rougeL"].fmeasure) for w, g in zip(wanted, given, strict=True)]


class Words:
    """What ROUGE-L compares: words of any script, single characters (with their marks) of those without blanks.

    rouge-score's own tokens where the text is ASCII, English words over three characters stemmed; its tokenizer leaves
    every other character out, so that a right answer in another script would score nothing.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """What `RougeScorer` asks for."""
        plain = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
        return [
            token for word in _split(plain) for token in (self._english.tokenize(word) if word.isascii() else [word])
        ]


def _split(text: str) -> Iterator[str]:
    word = ""
    for char in text:
        kind = unicodedata.category(char)[0]
        if kind == "M":  # a vowel sign or an accent, of the character before it
            word += char
            continue
        if word and (kind not in "LN" or _unspaced(char) or _unspaced(word[0])):
            yield word
            word = ""
        if kind in "LN":
            word += char
    if word:
        yield word


def _unspaced(char: str) -> bool:
    at = bisect_right(_UNSPACED, (ord(char), _UNSPACED[-1][1]))
    return at > 0 and ord(char) <= _UNSPACED[at - 1][1]


def bleu(wanted: Sequence[str], given: Sequence[str]) -> Measured:
    """Corpus BLEU in 0…1, sacrebleu's defaults (13a tokens, exponential smoothing) and its arithmetic.

    Where most letters wanted are of scripts without blanks between words, the tokens are characters.
    """
    from sacrebleu.metrics.bleu import BLEU

    letters = [_unspaced(char) for text in wanted for char in text if char.isalpha()]
    tokens = "char" if 2 * sum(letters) > len(letters) else "13a"
    # The effective order only so that it does not warn of short sentences; counts are the same.
    scorer = BLEU(effective_order=True, tokenize=tokens)
    rows = []
    for w, g in zip(wanted, given, strict=True):
        one = scorer.sentence_score(g, [w])
        rows.append((*one.counts, *one.totals, one.sys_len, one.ref_len))

    def of_totals(totals: Floats) -> Floats:
        flat = totals.reshape(-1, totals.shape[-1]).astype(np.int64)
        scores = [
            BLEU.compute_bleu(
                row[:_BLEU_ORDER].tolist(),
                row[_BLEU_ORDER : 2 * _BLEU_ORDER].tolist(),
                int(row[-2]),
                int(row[-1]),
                smooth_method="exp",
                max_ngram_order=_BLEU_ORDER,
            ).score
            / 100
            for row in flat
        ]
        return np.array(scores, np.float64).reshape(totals.shape[:-1])

    return Measured(np.array(rows, np.float64).reshape(-1, 2 * _BLEU_ORDER + 2), of_totals)


def per_token(nats: Sequence[float], tokens: Sequence[int]) -> Measured:
    """Cross-entropy in nats a token over pieces of text that have `tokens` predicted tokens each."""
    return Measured(np.stack([np.asarray(nats, np.float64), np.asarray(tokens, np.float64)], axis=1), _first_by_second)


def fields_of(record: Any) -> frozenset[Pair]:
    """A JSON value as (path, text) pairs; case counts, spaces around texts and the order of a list do not.

    Meant for records of texts and lists of texts, where a number is as good as its digits and no text is told twice;
    objects of any shape are compared by `training.tasks.json_answers`.
    """
    return frozenset(_pairs("", record))


def _pairs(path: str, value: Any) -> Iterator[Pair]:
    match value:
        case Mapping():
            for key, inner in value.items():
                yield from _pairs(f"{path}.{key}" if path else str(key), inner)
        case list():
            for inner in value:
                yield from _pairs(f"{path}[]", inner)
        case str():
            yield path, value.strip()
        case _:
            yield path, json.dumps(value)


def _first_by_second(totals: Floats) -> Floats:
    scores: Floats = totals[..., 0] / np.where(totals[..., 1] > 0, totals[..., 1], 1)
    return scores
