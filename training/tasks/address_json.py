"""US addresses to JSON: the addresses that people labelled, word by word, to train usaddress."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from training.data import Example
from training.metrics import Measured
from training.tasks import Answers, Built, Task
from training.tasks.json_answers import check_objects
from training.tasks.tagged_text import Source, Tagged, measure_records, sample, snake_case

INSTRUCTION: Final = "Split the address into its parts, as compact JSON."
# Only the files that people labelled by hand; the package's larger ones were generated from OpenStreetMap.
_SOURCE: Final = Source(
    "usaddress",
    "0.5.16",
    "f7e614e2489c159cf85be1b6f86edbfaf329dbeedef4d002a025757afd1ec6c6",
    ("training/labeled.xml", "training/us50_messiest_manual_label.xml", "training/us50_train_tagged.xml"),
)


class AddressJson(Task):
    """Address → record."""

    name = "address-json"
    title = "US address → its parts in JSON"
    max_new_tokens = 120
    headline = "field_f1"
    answers: Answers = "json"

    def build(self, train: int, evaluation: int, seed: int) -> Built:
        """See `Task.build`."""
        return Built(
            *sample(addresses(), INSTRUCTION, train, evaluation, seed),
            provenance=f"addresses labelled by people, shipped in the source archive of usaddress {_SOURCE.version}; "
            "runs of equally labelled words joined into fields",
            licence="MIT",
        )

    def check(self, examples: Sequence[Example]) -> None:
        """See `Task.check`: a wanted answer that is no object."""
        check_objects(examples)

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
        """Field F1, exactly right records, valid JSON."""
        return measure_records(examples, answers)


TASK = AddressJson()


@lru_cache(maxsize=1)
def addresses() -> tuple[Tagged, ...]:
    """Every distinct labelled address. Raises `SourceUnavailable`."""
    return _SOURCE.texts(snake_case)
