"""AWS documentation to one line: what an API operation's documentation says, in the words of its IAM description.

The documentation is botocore's, the line is the action's description in the list that parliament ships; they are
joined on service and operation. All operations of a service are on one side of the split.
"""

from __future__ import annotations

import gzip
import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from training.data import Example
from training.metrics import Measured, bleu, mean, rouge_l_each
from training.tasks import Answers, Built, Task
from training.tasks.iam_definition import actions
from training.tasks.packages import installed_directory
from training.tasks.split import split_by_group

INSTRUCTION: Final = "Say in one short phrase what this AWS operation does."
_CHARS: Final = (300, 2500)  # of documentation
_MIN_WORDS: Final = 6  # of summary
_HARD_BELOW: Final = 0.6  # ROUGE-L of the first sentence: above it, copying that sentence is nearly the answer


@dataclass(frozen=True)
class Operation:
    """An operation with its documentation and its one-line description."""

    service: str  # "transcribe"
    name: str  # "CreateVocabulary"
    documentation: str  # plain text
    summary: str


class AwsSummary(Task):
    """Documentation → one line."""

    name = "aws-summary"
    title = "documentation of an AWS operation → one line"
    max_new_tokens = 40
    headline = "rouge_l"
    answers: Answers = "short"

    def build(self, train: int, evaluation: int, seed: int) -> Built:
        """See `Task.build`."""
        chosen = split_by_group(
            operations(),
            group=lambda operation: operation.service,
            identity=lambda operation: f"{operation.service}:{operation.name}",
            train=train,
            evaluation=evaluation,
            seed=seed,
        )
        training, held = (tuple(_example(operation) for operation in side) for side in chosen)
        _, botocore_version = installed_directory("botocore", "botocore")
        _, parliament_version = actions()
        return Built(
            training,
            held,
            provenance=f"operation documentation of botocore {botocore_version} joined to the one-line IAM action "
            f"descriptions shipped in parliament {parliament_version}",
            licence="Apache-2.0 (botocore), BSD-3-Clause (parliament)",
        )

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
        """ROUGE-L beside that of the first sentence ("lead"), over all and over those where the lead is no answer.

        BLEU is sacrebleu's, over all answers together.
        """
        wanted = [example.answer for example in examples]
        own = rouge_l_each(wanted, answers)
        lead = rouge_l_each(wanted, [first_sentence(example.prompt[-1].content) for example in examples])
        hard = [score < _HARD_BELOW for score in lead]
        return {
            "rouge_l": mean(own),
            "rouge_l_lead": mean(lead),
            "rouge_l_hard": mean(own, hard),
            "rouge_l_lead_hard": mean(lead, hard),
            "bleu": bleu(wanted, answers),
            "words_count": mean([len(answer.split()) for answer in answers]),
        }


TASK = AwsSummary()


@lru_cache(maxsize=1)
def operations() -> tuple[Operation, ...]:
    """Every operation that has both texts, in bounds, each summary once. Raises `SourceUnavailable`."""
    return tuple(_read_operations())


def _read_operations() -> Iterator[Operation]:
    described, _ = actions()
    summaries = {(action.prefix, action.name.lower()): action.phrase for action in described}
    seen: set[str] = set()
    directory, _ = installed_directory("botocore", "botocore")
    for file in _newest_models(directory / "data"):
        model = _load(file)
        service = str(model["metadata"].get("signingName") or model["metadata"]["endpointPrefix"]).lower()
        for name, operation in model["operations"].items():
            summary = summaries.get((service, name.lower()))
            text = plain_text(operation.get("documentation", ""))
            if summary is None or not _CHARS[0] <= len(text) <= _CHARS[1]:
                continue
            if len(summary.split()) >= _MIN_WORDS and summary.lower() not in seen:
                seen.add(summary.lower())
                yield Operation(service, name, text, summary[0].upper() + summary[1:])


def plain_text(markup: str) -> str:
    """HTML documentation as one paragraph."""
    text = html.unescape(re.sub(r"<[^>]+>", " ", markup))
    return re.sub(r" ([.,;:)])", r"\1", " ".join(text.split()))


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence."""
    return re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]


def _newest_models(data: Path) -> Iterator[Path]:
    for service in sorted(path for path in data.iterdir() if path.is_dir()):
        found = sorted(service.glob("*/service-2.json*"))
        if found:
            yield found[-1]


def _load(file: Path) -> dict[str, Any]:
    data = file.read_bytes()
    model: dict[str, Any] = json.loads(gzip.decompress(data) if file.suffix == ".gz" else data)
    return model


def _example(operation: Operation) -> Example:
    gold = {"operation": f"{operation.service}:{operation.name}"}
    return Example.of(system=INSTRUCTION, user=operation.documentation, answer=operation.summary, gold=gold)
