"""Seed tasks: where their examples come from, how prompts are worded, how answers are scored.

A task is an object with the attributes of `Task`, named `TASK` in a module of this package and listed in `MODULES`.
Data comes from what installed packages carry, never from a copy of ours. To add a task, write that module and that
line; `hub data build`, `hub train` and `hub eval` need nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Literal, Protocol

from training.data import Example
from training.errors import UnknownTask
from training.metrics import Measured

MODULES = {
    "sentiment": "training.tasks.sentiment",
    "iam-policy": "training.tasks.iam_policy",
    "aws-summary": "training.tasks.aws_summary",
    "nl-awscli": "training.tasks.nl_awscli",
    "address-json": "training.tasks.address_json",
    "name-json": "training.tasks.name_json",
}
# Data of one's own: scores and nothing to build. Name → (module, its object).
OWN = {
    "own-label": ("training.tasks.own", "LABEL"),
    "own-json": ("training.tasks.own", "JSON"),
    "own-text": ("training.tasks.own", "TEXT"),
}

# "label": a few words of a closed set; "json": JSON and nothing else; "short": a line; "long": prose.
Answers = Literal["label", "json", "short", "long"]


@dataclass(frozen=True)
class Built:
    """A task's examples. No question of an evaluation set, nor one of its group, occurs in `train`."""

    train: tuple[Example, ...]
    evaluation: tuple[Example, ...]
    provenance: str  # package, version and what was done to it: one or two sentences
    licence: str  # of the source
    apart: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)  # more evaluation sets, by file stem


class Task(Protocol):
    """The contract.

    `build` is a function of its arguments and the installed packages alone: equal calls give equal examples, and a
    larger `train` starts with the examples of a smaller one. It raises `SourceUnavailable`, saying what to install,
    and `DataTooSmall` when the source has fewer examples than asked for.

    `measure` takes the evaluation examples and one answer for each, in order, and returns metrics by name; all lie in
    0…1 unless their name says a unit, and larger is better. It never raises on an answer, whatever that holds; that the
    examples are its kind is for `check` to say.
    """

    name: str
    title: str  # one line for people
    max_new_tokens: int  # enough for nearly all wanted answers
    headline: str  # the metric by which two models are compared
    answers: Answers  # what kind of text an answer is

    def build(self, train: int, evaluation: int, seed: int) -> Built:
        """Examples for training and evaluation."""
        ...

    def check(self, examples: Sequence[Example]) -> None:
        """Raise `DataInvalid`, before any model answers, where `measure` could not score answers to these examples."""
        return

    def answer_limit(self, examples: Sequence[Example], count_tokens: Callable[[str], int]) -> int:
        """How many tokens an answer to these examples may have."""
        return self.max_new_tokens

    def measure(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Measured]:
        """Metrics of `answers`, by example."""
        ...

    def score(self, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, float]:
        """Metrics of `answers`, over all examples."""
        return {name: measured.value for name, measured in self.measure(examples, answers).items()}


def task_named(name: str) -> Task:
    """The task of that name. Raises `UnknownTask`, listing those there are."""
    if name not in MODULES and name not in OWN:
        raise UnknownTask(f"no task is called {name!r}; there are: {', '.join([*MODULES, *OWN])}")
    module, attribute = OWN[name] if name in OWN else (MODULES[name], "TASK")
    found: Task = getattr(import_module(module), attribute)
    return found
