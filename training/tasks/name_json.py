"""Names of people and companies to JSON: the names that people labelled, word by word, to train probablepeople."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from training.data import Example
from training.metrics import Measured
from training.tasks import Answers, Built, Task
from training.tasks.json_answers import check_objects
from training.tasks.tagged_text import Source, Tagged, measure_records, sample, snake_case

INSTRUCTION: Final = "Split the name of a person or company into its parts, as compact JSON."
_SOURCE: Final = Source(
    "probablepeople",
    "0.5.6",
    "4ae95e77f9fa7dceb116538500ab48c81a91bf68eb652d45207b794b450f4392",
    ("name_data/labeled/person_labeled.xml", "name_data/labeled/company_labeled.xml"),
)


class NameJson(Task):
    """Name → record."""

    name = "name-json"
    title = "name of a person or company → its parts in JSON"
    max_new_tokens = 100
    headline = "field_f1"
    answers: Answers = "json"

    def build(self, train: int, evaluation: int, seed: int) -> Built:
        """See `Task.build`."""
        return Built(
            *sample(names(), INSTRUCTION, train, evaluation, seed),
            provenance="names labelled by people, shipped in the source archive of probablepeople "
            f"{_SOURCE.version}; runs of equally labelled words joined into fields",
            licence="MIT",
        )

    def check(self, examples: Sequence[Example]) -> None:
        """See `Task.check`: a wanted answer that is no object."""
        check_objects(examples)

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
        """Field F1, exactly right records, valid JSON."""
        return measure_records(examples, answers)


TASK = NameJson()


@lru_cache(maxsize=1)
def names() -> tuple[Tagged, ...]:
    """Every distinct labelled name. Raises `SourceUnavailable`."""
    return _SOURCE.texts(snake_case)
