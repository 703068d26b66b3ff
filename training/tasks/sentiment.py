"""Sentiment in four classes, from human ratings of short texts.

A stand-in for employee feedback: film reviews, tweets, product reviews and newspaper editorials, 23,703 snippets, each
rated by 15 or more people on a scale from -4 to +4. They lie in the source archive of the package vaderSentiment:
C. J. Hutto and E. Gilbert, "VADER", ICWSM 2014.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from training.data import Example
from training.metrics import Measured, accuracy, macro_f1, mean
from training.tasks import Answers, Built, Task
from training.tasks.archive import read_member
from training.tasks.packages import source_archive
from training.tasks.split import split_by_group

LABELS: Final = ("positive", "negative", "neutral", "mixed")
# Of ten wordings the one the untrained base does best with, so that training is not credited with the wording.
INSTRUCTION: Final = "Answer with one word: positive, negative, neutral or mixed."

_VERSION: Final = "3.3.2"
_SHA256: Final = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER: Final = f"vaderSentiment-{_VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
# Corpus → whether its ids are "document_sentence", so that a document must stay on one side of the split.
_CORPORA: Final = {
    "amazonReviewSnippets": True,
    "movieReviewSnippets": False,
    "nytEditorialSnippets": True,
    "tweets": False,
}
_OPPOSED_SHARE: Final = 0.3  # "mixed": at least this share of the raters on either side of zero
_NEUTRAL_MEAN: Final = 0.4


@dataclass(frozen=True)
class Snippet:
    """One rated text."""

    id: str  # "tweets/17"
    document: str  # what must not be split
    text: str
    label: str


class Sentiment(Task):
    """Text → one of four words."""

    name = "sentiment"
    title = "short text → positive, negative, neutral or mixed"
    max_new_tokens = 12
    headline = "accuracy"
    answers: Answers = "label"

    def build(self, train: int, evaluation: int, seed: int) -> Built:
        """See `Task.build`; classes keep their natural shares."""
        chosen = split_by_group(
            snippets(),
            group=lambda snippet: snippet.document,
            identity=lambda snippet: snippet.id,
            train=train,
            evaluation=evaluation,
            seed=seed,
        )
        training, held = (tuple(_example(snippet) for snippet in side) for side in chosen)
        return Built(
            training,
            held,
            provenance=f"human ratings shipped in the source archive of vaderSentiment {_VERSION} (Hutto and Gilbert, "
            "ICWSM 2014); labels derived from the ratings; a stand-in for employee feedback",
            licence="MIT",
        )

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
        """Accuracy, macro-F1 over the classes that occur, and the share of answers that name a class."""
        wanted = [example.answer for example in examples]
        given = [parse_label(answer) for answer in answers]
        return {
            "accuracy": accuracy(wanted, given),
            "macro_f1": macro_f1(wanted, given, LABELS),
            "parse_rate": mean([label is not None for label in given]),
        }


TASK = Sentiment()


def parse_label(answer: str) -> str | None:
    """The first class that the answer names, in any case and any sentence; None when it names none."""
    found = re.search(r"\b(" + "|".join(LABELS) + r")\b", answer.lower())
    return found.group(1) if found else None


def label_of(ratings: Sequence[int]) -> str:
    """The class of a text from its ratings (-4…4)."""
    positive = sum(rating > 0 for rating in ratings) / len(ratings)
    negative = sum(rating < 0 for rating in ratings) / len(ratings)
    if positive >= _OPPOSED_SHARE and negative >= _OPPOSED_SHARE:
        return "mixed"
    mean = sum(ratings) / len(ratings)
    if abs(mean) <= _NEUTRAL_MEAN:
        return "neutral"
    return "positive" if mean > 0 else "negative"


@lru_cache(maxsize=1)
def snippets() -> tuple[Snippet, ...]:
    """Every distinct rated text. Raises `SourceUnavailable`."""
    return tuple(_read_snippets())


def _read_snippets() -> Iterator[Snippet]:
    seen: set[str] = set()
    with tarfile.open(source_archive("vaderSentiment", _VERSION, _SHA256), "r:gz") as outer:
        with tarfile.open(fileobj=io.BytesIO(read_member(outer, _INNER)), mode="r:gz") as inner:
            for corpus, by_document in _CORPORA.items():
                texts = dict(_rows(inner, f"{corpus}_GroundTruth.txt"))
                for row, ratings in _rows(inner, f"{corpus}_anonDataRatings.txt"):
                    text = " ".join(texts[row].split())
                    # "Wrong!" and "wrong." are one question: on two sides of the split they would be a leak.
                    plain = re.sub(r"[\W_]+", " ", text.lower()).strip() or text
                    if not text or plain in seen:
                        continue
                    seen.add(plain)
                    document = row.split("_")[0] if by_document else row
                    yield Snippet(f"{corpus}/{row}", f"{corpus}/{document}", text, label_of(json.loads(ratings)))


def _rows(archive: tarfile.TarFile, name: str) -> Iterator[tuple[str, str]]:
    """(id, last column) of a tab-separated member."""
    for line in read_member(archive, f"hutto_ICWSM_2014/{name}").decode("utf-8-sig").splitlines():
        columns = line.split("\t")
        if len(columns) >= 3:
            yield columns[0], columns[-1]


def _example(snippet: Snippet) -> Example:
    return Example.of(system=INSTRUCTION, user=f"Text: {snippet.text}\nSentiment:", answer=snippet.label)
