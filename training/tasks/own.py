"""Scores for data of one's own, which no task here builds: by the kind of the answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from training.data import Example
from training.errors import SourceUnavailable
from training.metrics import Measured, accuracy, bleu, macro_f1, mean, micro_f1, rouge_l
from training.tasks import Answers, Built, Task
from training.tasks.json_answers import check_objects, fields_of, parse_object
from training.tasks.policy import parse_json

_SPARE_TOKENS: Final = 8  # above the longest wanted answer: other spellings of it, and the token that ends it


class _Own(Task):
    """Data that the user brings."""

    def answer_limit(self, examples: Sequence[Example], count_tokens: Callable[[str], int]) -> int:
        """Enough for the longest wanted answer too: how long they are is the user's to say."""
        longest = max((count_tokens(example.answer) for example in examples), default=0)
        return max(self.max_new_tokens, longest + _SPARE_TOKENS)

    def build(self, train: int, evaluation: int, seed: int) -> Built:
        """Nothing: raises `SourceUnavailable`."""
        raise SourceUnavailable(f"{self.name} is for data of your own: `hub data import` makes it from CSV")


class OwnLabel(_Own):
    """One of a few labels; case, spaces around and a final stop do not count."""

    name = "own-label"
    title = "your data: a label"
    max_new_tokens = 16
    headline = "accuracy"
    answers: Answers = "label"

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
        """Accuracy, macro-F1 over the labels that occur, and the share of answers that are one of these labels."""
        wanted = [plain(example.answer) for example in examples]
        labels = sorted(set(wanted))
        given = [plain(answer) if plain(answer) in labels else None for answer in answers]
        return {
            "accuracy": accuracy(wanted, given),
            "macro_f1": macro_f1(wanted, given, labels),
            "label_rate": mean([label is not None for label in given]),
        }


class OwnJson(_Own):
    """A JSON object."""

    name = "own-json"
    title = "your data: a JSON object"
    max_new_tokens = 256
    headline = "field_f1"
    answers: Answers = "json"

    def check(self, examples: Sequence[Example]) -> None:
        """See `Task.check`: a wanted answer that is no object."""
        check_objects(examples)

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
        """F1 over the values at all places, exactly right objects, valid JSON."""
        wanted = [json.loads(example.answer) for example in examples]
        given = [parse_object(answer) for answer in answers]
        return {
            "field_f1": micro_f1(
                [fields_of(record) for record in wanted],
                [fields_of(record) if record is not None else Counter() for record in given],
            ),
            "exact_json": mean([_sorted(w) == _sorted(g) for w, g in zip(wanted, given, strict=True)]),
            "valid_json": mean([parse_json(answer) is not None for answer in answers]),
        }


class OwnText(_Own):
    """A text in prose."""

    name = "own-text"
    title = "your data: a text"
    max_new_tokens = 200
    headline = "rouge_l"
    answers: Answers = "long"

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
        """ROUGE-L, BLEU, and the share that is word for word what was wanted."""
        wanted = [example.answer for example in examples]
        same = [" ".join(a.split()) == " ".join(b.split()) for a, b in zip(wanted, answers, strict=True)]
        return {"rouge_l": rouge_l(wanted, answers), "bleu": bleu(wanted, answers), "exact": mean(same)}


def _sorted(record: object) -> str:
    return json.dumps(record, sort_keys=True)


def plain(label: str) -> str:
    """A label as it is compared."""
    return " ".join(label.split()).rstrip(".").casefold()


LABEL, JSON, TEXT = OwnLabel(), OwnJson(), OwnText()
