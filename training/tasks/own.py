"""Scores for data of one's own, which no task here builds: by the kind of the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence

from training.data import Example
from training.errors import DataInvalid, SourceUnavailable
from training.metrics import Measured, accuracy, bleu, macro_f1, mean, rouge_l
from training.tasks import Answers, Built, Task
from training.tasks.tagged_text import measure_records


class _Own(Task):
    """Data that the user brings."""

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

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
        """Field F1, exactly right objects, valid JSON. Raises `DataInvalid` where a wanted answer is no object."""
        for number, example in enumerate(examples, 1):
            try:
                sound = isinstance(json.loads(example.answer), dict)
            except (ValueError, RecursionError):
                sound = False
            if not sound:
                raise DataInvalid(
                    f"the answer of example {number} is no JSON object: `hub data check` finds such lines"
                )
        return measure_records(examples, answers)


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


def plain(label: str) -> str:
    """A label as it is compared."""
    return " ".join(label.split()).rstrip(".").casefold()


LABEL, JSON, TEXT = OwnLabel(), OwnJson(), OwnText()
