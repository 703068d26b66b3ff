"""Texts whose words people have labelled, as "text → JSON record" examples.

usaddress and probablepeople ship their training data as XML: a text is an element, each run of words in it an element
named by its label. Labels become the record's fields; words that share a label and stand together are one value; a
label that comes back later has a list of values.
"""

from __future__ import annotations

import json
import re
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from training.data import Example
from training.metrics import Measured, fields_of, mean, micro_f1
from training.tasks.archive import read_member
from training.tasks.packages import source_archive
from training.tasks.policy import parse_json
from training.tasks.split import split_by_group

Record = dict[str, str | list[str]]

_OUTER_PUNCTUATION: Final = " ,;"


@dataclass(frozen=True)
class Tagged:
    """One labelled text."""

    text: str
    record: Record

    @property
    def group(self) -> str:
        """Letters and digits alone: texts that differ in case or punctuation are one question."""
        return re.sub(r"[^a-z0-9]+", " ", self.text.lower()).strip()


@dataclass(frozen=True)
class Source:
    """Where labelled texts lie."""

    distribution: str
    version: str
    sha256: str  # of the source archive
    members: tuple[str, ...]  # XML files in it, below the directory that names distribution and version

    def texts(self, field_name: Callable[[str], str]) -> tuple[Tagged, ...]:
        """Every distinct text, in the files' order. Raises `SourceUnavailable`."""
        found: dict[str, Tagged] = {}
        with tarfile.open(source_archive(self.distribution, self.version, self.sha256), "r:gz") as archive:
            for member in self.members:
                name = f"{self.distribution}-{self.version}/{member}"
                # The archive is one whose bytes are known, so no parser for hostile XML is needed.
                for element in ElementTree.fromstring(read_member(archive, name)):
                    tagged = _tagged(element, field_name)
                    if tagged is not None:
                        found.setdefault(tagged.group, tagged)
        return tuple(found.values())


def sample(
    texts: Sequence[Tagged], instruction: str, train: int, evaluation: int, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(training, evaluation) examples. Raises `DataTooSmall`."""
    sides = split_by_group(
        texts,
        group=lambda tagged: tagged.group,
        identity=lambda tagged: tagged.text,
        train=train,
        evaluation=evaluation,
        seed=seed,
    )
    training, held = (tuple(_example(tagged, instruction) for tagged in side) for side in sides)
    return training, held


def measure_records(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
    """Field F1 over all (field, value) pairs, the share of exactly right records, and of answers that are JSON."""
    wanted = [fields_of(json.loads(example.answer)) for example in examples]
    parsed = [parse_json(answer) for answer in answers]
    given = [fields_of(record) if isinstance(record, dict) else frozenset[tuple[str, str]]() for record in parsed]
    return {
        "field_f1": micro_f1(wanted, given),
        "exact_json": mean(
            [
                isinstance(record, dict) and _sorted(record) == _sorted(json.loads(example.answer))
                for record, example in zip(parsed, examples, strict=True)
            ]
        ),
        "valid_json": mean([record is not None for record in parsed]),
    }


def snake_case(label: str) -> str:
    """ "StreetNamePostType" → "street_name_post_type", "USPSBoxID" → "usps_box_id"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=USPS)(?=[A-Z])", "_", label).lower()


def _tagged(element: ElementTree.Element, field_name: Callable[[str], str]) -> Tagged | None:
    words = [(part.tag, (part.text or "").strip()) for part in element]
    if not words or not all(text for _, text in words):
        return None
    record: dict[str, list[str]] = {}
    for label, values in _runs(words):
        value = " ".join(values).strip(_OUTER_PUNCTUATION)
        if value:
            record.setdefault(field_name(label), []).append(value)
    if not record:
        return None
    text = " ".join(word for _, word in words)
    return Tagged(text, {name: values[0] if len(values) == 1 else values for name, values in record.items()})


def _runs(words: Sequence[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    current: list[str] = []
    for index, (label, word) in enumerate(words):
        current.append(word)
        if index + 1 == len(words) or words[index + 1][0] != label:
            yield label, current
            current = []


def _example(tagged: Tagged, instruction: str) -> Example:
    answer = json.dumps(tagged.record, ensure_ascii=False, separators=(",", ":"))
    return Example.of(system=instruction, user=tagged.text, answer=answer)


def _sorted(record: Any) -> str:
    return json.dumps(record, sort_keys=True)
