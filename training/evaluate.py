"""Scoring models on a task: the base and any number of adapters, all answering in one mixed batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from training.bootstrap import Interval, interval, interval_of_difference
from training.data import Example, Message
from training.metrics import Measured
from training.tasks import Task


@dataclass(frozen=True)
class Prompt:
    """One question for one model."""

    messages: tuple[Message, ...]
    adapter: str | None  # a name that the generator knows; None: the base
    max_new_tokens: int
    label: str = ""  # which question this is, for whoever reads of an error


class Generator(Protocol):
    """Answers prompts greedily, in whatever batches it likes.

    Returns one text for each prompt, in order. Raises `GenerationFailed` when any prompt gets none: a score over part
    of the examples is no score.
    """

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        """The answers."""
        ...


@dataclass(frozen=True)
class Result:
    """How one model did."""

    model: str  # "base" or the adapter's name
    metrics: dict[str, float]
    answers: tuple[str, ...] = field(repr=False)
    measured: dict[str, Measured] = field(repr=False, default_factory=dict)  # the same metrics, by example

    def intervals(self, seed: int) -> dict[str, Interval]:
        """The 95 % interval of each metric."""
        return {name: interval(measured, seed) for name, measured in self.measured.items()}

    def against(self, other: Result, seed: int) -> dict[str, Difference]:
        """Each metric minus that of another model on the same examples."""
        return {
            name: Difference(
                self.metrics[name] - other.metrics[name],
                interval_of_difference(measured, other.measured[name], seed),
            )
            for name, measured in self.measured.items()
        }


@dataclass(frozen=True)
class Difference:
    """One model's metric minus another's, and where it lies on other draws of the questions (paired, 95 %)."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Comparison:
    """All models on the same examples."""

    results: tuple[Result, ...]
    examples: int
    seconds: float  # of generation, all models together
    max_new_tokens: int  # that an answer could have


def evaluate(
    task: Task,
    examples: Sequence[Example],
    adapters: Sequence[str | None],
    generator: Generator,
    max_new_tokens: int | None = None,
) -> Comparison:
    """Ask every model every question, in one call of the generator, and score each.

    `adapters` holds distinct names; None is the base. Answers have as many tokens as the task says, or as told. Raises
    what the task's `check` and the generator raise.
    """
    task.check(examples)
    limit = max_new_tokens or task.max_new_tokens
    prompts = [
        Prompt(example.prompt, adapter, limit, f"example {number}")
        # Question by question, so that the models share batches of prompts of about one length.
        for number, example in enumerate(examples, 1)
        for adapter in adapters
    ]
    started = time.monotonic()
    answers = generator.generate(prompts)
    seconds = time.monotonic() - started
    results = []
    for index, adapter in enumerate(adapters):
        own = tuple(answers[index :: len(adapters)])
        measured = task.measure(examples, own)
        scores = {name: one.value for name, one in measured.items()}
        results.append(Result(adapter or "base", scores, own, measured))
    return Comparison(tuple(results), len(examples), seconds, limit)
