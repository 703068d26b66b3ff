"""What a strategy is: a stage's past, the lesson to be trained, what becomes of it, and the contract over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch

from training.continual.errors import ContinualPlanInvalid
from training.continual.factors import Factors
from training.continual.replay import Line
from training.continual.rules import SiteRule

E = TypeVar("E", bound=Line)
Weights = Callable[[Sequence[str]], Any]  # modules → pairs (module, W [out, in] float32), in that order


@dataclass(frozen=True)
class Outcome(Generic[E]):
    """What a stage leaves behind."""

    served: Factors  # what answers; its bytes are the adapter's
    kept: Mapping[str, Factors] = field(default_factory=dict)  # what later stages need besides
    memory: tuple[E, ...] = ()  # examples kept for replay
    notes: Mapping[str, float] = field(default_factory=dict)  # numbers for the report


@dataclass(frozen=True)
class Past(Generic[E]):
    """What a stage starts from."""

    stage: int  # from 0
    examples: tuple[E, ...]  # the new task's
    outcomes: tuple[Outcome[E], ...]  # of all stages before, in order
    earlier: tuple[tuple[E, ...], ...]  # all examples of all tasks before; only `joint` may look at them
    answers: Callable[[Factors, Sequence[E]], Sequence[E]]  # the same prompts with an adapter's own answers
    readable: Callable[[Sequence[E]], Sequence[E]]  # those of them that are short enough for `losses` and `inputs`
    # nats a token of each example's own answer, with each of the adapters
    losses: Callable[[Sequence[Factors], Sequence[E]], Sequence[Sequence[float]]]
    # Σ weight · E[x xᵀ] of the inputs of every matrix that an adapter adapts, over groups of examples; None is the text
    # to keep, and nothing where the plan has no such text. Empty where there is nothing to read.
    inputs: Callable[[Factors, Sequence[tuple[float, Sequence[E] | None]]], Mapping[str, torch.Tensor]]
    train: Callable[[Lesson[E]], Factors]  # a further lesson of this stage, after the first; its factors
    weights: Weights
    seed: int

    @property
    def previous(self) -> Outcome[E] | None:
        """The stage before, if any."""
        return self.outcomes[-1] if self.outcomes else None


@dataclass(frozen=True)
class Lesson(Generic[E]):
    """What one stage trains."""

    examples: tuple[E, ...]
    start: Factors | None = None  # values to begin with; None: a fresh adapter
    grow: bool = False  # add a fresh adapter's rows after those of `start`
    rules: Mapping[str, SiteRule] = field(default_factory=dict)  # by module
    rule: Callable[[str, Any], SiteRule | None] | None = field(default=None, repr=False)  # for modules without `start`
    passes: float = 1.0  # over the examples, as a multiple of the recipe's
    notes: Mapping[str, float] = field(default_factory=dict)


class Strategy(Protocol):
    """The contract.

    `lesson` and `finish` are functions of their arguments alone, so that a stage that was cut short is begun again, or
    gone on with, to the same end. `finish` gets the factors that training gave back: of `start`'s ranks (plus a fresh
    adapter's with `grow`), with the rules kept. Where one lesson is not enough it has others trained by `past.train`,
    always in the same order. What it returns as `served` is a plain LoRA, to be served by anyone alone; `memory` and
    `kept` are all that later stages see of this one's data and weights. Past examples are used by the strategies that
    declare it only: `earlier` by none but `joint`, which is a bound and no method.

    `evolving`: one adapter, the newest, answers every task. Otherwise each task is answered by its own stage's, and
    tasks yet to come by the base. `inherits`: a stage is made from the one before, its parent in the hub.
    """

    @property
    def name(self) -> str:
        """As plans name it."""
        ...

    @property
    def evolving(self) -> bool:
        """See above."""
        ...

    @property
    def inherits(self) -> bool:
        """See above."""
        ...

    def served_rank(self, rank: int, stages: int) -> int:
        """The largest rank of what so many stages serve, where a fresh adapter has `rank`."""
        ...

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """What to train."""
        ...

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """What becomes of it."""
        ...


def check_between(strategy: str, option: str, value: float, low: float, high: float) -> None:
    """Raise `ContinualPlanInvalid` where an option's value lies outside."""
    if not low <= value <= high:
        raise ContinualPlanInvalid(
            f"strategy {strategy}: {option} must lie between {low:g} and {high:g}, not {value:g}"
        )
