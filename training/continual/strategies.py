"""Ways to learn task after task, behind one contract (`training.continual.contract`).

A strategy says what a stage trains (a `Lesson`) and what becomes of the result (an `Outcome`). It knows neither the
trainer nor the model: a `Lesson` is examples, values to begin with, and rules for the factors; whoever trains it gives
back factors. One suite (tests/training/continual/test_strategies.py) runs over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from training.continual import intruders
from training.continual.contract import Lesson, Outcome, Past, Strategy, check_between
from training.continual.errors import ContinualPlanInvalid
from training.continual.factors import Factors, Pair
from training.continual.merging import HOWS, How, merge
from training.continual.replay import Line, draw, remember
from training.continual.rules import SiteRule

E = TypeVar("E", bound=Line)


@dataclass(frozen=True)
class Isolated:
    """A fresh adapter for each task, which nothing after it touches; a router picks one by the prompt."""

    name: str = "isolated"
    evolving: bool = False
    inherits: bool = False

    def served_rank(self, rank: int, stages: int) -> int:
        """A fresh adapter's."""
        return rank

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """The task, from nothing."""
        return Lesson(past.examples)

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """As trained."""
        return Outcome(trained)


@dataclass(frozen=True)
class Joint:
    """All tasks so far at once, from nothing: what is reached where no data is ever gone. A bound, not a method."""

    name: str = "joint"
    evolving: bool = True
    inherits: bool = False

    def served_rank(self, rank: int, stages: int) -> int:
        """A fresh adapter's."""
        return rank

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """Every example there ever was."""
        return Lesson(tuple(one for task in (*past.earlier, past.examples) for one in task))

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """As trained."""
        return Outcome(trained)


@dataclass(frozen=True)
class Sequential:
    """One adapter trained on and on: what happens where nobody minds."""

    name: str = "sequential"
    evolving: bool = True
    inherits: bool = True

    def served_rank(self, rank: int, stages: int) -> int:
        """A fresh adapter's."""
        return rank

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """The new task, from the adapter so far."""
        return Lesson(past.examples, start=past.previous.served if past.previous else None)

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """As trained."""
        return Outcome(trained)


@dataclass(frozen=True)
class Replay:
    """Sequential, with a share of kept examples of earlier tasks among the new ones."""

    share: float = 0.05  # of a stage's examples
    capacity: int = 500  # examples kept, all tasks together
    own_answers: bool = False  # the earlier adapter's answers to those prompts instead of the data's
    name: str = "replay"
    evolving: bool = True
    inherits: bool = True

    def __post_init__(self) -> None:
        check_between(self.name, "share", self.share, 0, 0.5)
        check_between(self.name, "capacity", self.capacity, 0, 1_000_000)

    def served_rank(self, rank: int, stages: int) -> int:
        """A fresh adapter's."""
        return rank

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """The new task and a draw from the memory.

        With `own_answers` the adapter before this stage answers the drawn prompts itself, so that what is replayed lies
        where that adapter is, not where its data was; drawn examples it has no answer to are left out.
        """
        if past.previous is None:
            return Lesson(past.examples)
        served = past.previous.served
        drawn: Sequence[E] = draw(past.previous.memory, self.share, len(past.examples), past.seed, past.stage)
        asked = len(drawn)
        if self.own_answers and drawn:
            drawn = past.answers(served, drawn)
        notes = {"replayed": len(drawn), "unanswered": asked - len(drawn)}
        return Lesson((*past.examples, *drawn), start=served, notes=notes)

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """As trained, and the memory with some of this task."""
        memory = past.previous.memory if past.previous else ()
        return Outcome(trained, memory=remember(memory, past.examples, self.capacity, past.seed))


@dataclass(frozen=True)
class OLora:
    """New rows for each task, pushed away from all earlier ones (Wang et al. 2023, arXiv:2310.14152).

    Earlier factors stay as they are and answer along: ΔW = Σ bᵢ aᵢ. The loss of a step gets
    weight · Σ ‖a_new aᵢᵀ‖² over all matrices. The adapter grows by a recipe's rank a stage, exactly, by factors side by
    side.
    """

    weight: float = 0.5
    name: str = "o-lora"
    evolving: bool = True
    inherits: bool = True

    def __post_init__(self) -> None:
        check_between(self.name, "weight", self.weight, 0, 1e9)

    def served_rank(self, rank: int, stages: int) -> int:
        """A fresh adapter's more every stage."""
        return rank * stages

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """The new task, in new rows."""
        if past.previous is None:
            return Lesson(past.examples)
        before = past.previous.served
        rules = {module: SiteRule(pair.rank, pair.a, self.weight) for module, pair in before.items()}
        return Lesson(past.examples, start=before, grow=True, rules=rules)

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """As trained: earlier rows and new ones."""
        return Outcome(trained)


@dataclass(frozen=True)
class Slao:
    """One merged adapter of constant size (Qiao and Mahdavi 2025, arXiv:2512.23017).

    Stage i (from 1) begins with a = Qᵀ of QR(aᵀ) and b of stage i-1 as it was *trained*; afterwards
    a_merged = a_trained and b_merged += (b_trained - b_merged) / √i. The trained factors are kept beside the served.
    """

    name: str = "slao"
    evolving: bool = True
    inherits: bool = True

    def served_rank(self, rank: int, stages: int) -> int:
        """A fresh adapter's."""
        return rank

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """The new task, from the last trained factors with a made orthonormal."""
        if past.previous is None:
            return Lesson(past.examples)
        trained = past.previous.kept["trained"]
        return Lesson(past.examples, start={module: Pair(orthonormal(p.a), p.b) for module, p in trained.items()})

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """The merge."""
        if past.previous is None:
            return Outcome(trained, {"trained": trained, "merged": trained})
        before, step = past.previous.kept["merged"], (past.stage + 1) ** -0.5
        merged = {m: Pair(p.a, before[m].b + step * (p.b - before[m].b)) for m, p in trained.items()}
        return Outcome(merged, {"trained": trained, "merged": merged})


@dataclass(frozen=True)
class Osf:
    """Training in what the weights so far leave over: orthogonal to their strongest singular directions.

    Orthogonal subspace fine-tuning (Nayak et al. 2025, arXiv:2504.07097) trains all but the `keep` strongest singular
    triples of W. PEFT's OSF saves those whole (as large as the base, and it cannot read an NF4 base), which nobody can
    serve beside others. Here the same constraint holds for a LoRA: each stage adds rows whose b is orthogonal to the
    left and whose a is orthogonal to the right `keep` strongest singular vectors of W + Σ earlier ΔW.
    """

    keep: float = 0.5  # of the smaller side's singular directions
    name: str = "osf"
    evolving: bool = True
    inherits: bool = True

    def __post_init__(self) -> None:
        check_between(self.name, "keep", self.keep, 0.01, 0.99)

    def served_rank(self, rank: int, stages: int) -> int:
        """A fresh adapter's more every stage."""
        return rank * stages

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """The new task, in new rows outside the strongest directions."""
        if past.previous is None:
            return Lesson(past.examples, rule=lambda module, weight: self.guard(weight, None))
        before = past.previous.served
        rules = {module: self.guard(weight, before[module]) for module, weight in past.weights(list(before))}
        return Lesson(past.examples, start=before, grow=True, rules=rules)

    def guard(self, weight: torch.Tensor, before: Pair | None) -> SiteRule:
        """The directions of one matrix to keep out of."""
        now = weight.float() if before is None else weight.float() + before.delta()
        u, _, vt = torch.linalg.svd(now, full_matrices=False)
        kept = max(1, min(int(self.keep * min(now.shape)), min(now.shape) - 1))
        return SiteRule(before.rank if before else 0, left=u[:, :kept].contiguous(), right=vt[:kept].T.contiguous())

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """As trained: earlier rows and new ones."""
        return Outcome(trained)


@dataclass(frozen=True)
class Merge:
    """A fresh adapter for each task; all of them merged into one after each stage. The task adapters are kept."""

    how: How = "ties"
    density: float = 0.2  # of each ΔW's entries, for "ties"
    rank_factor: float = 2.0  # the merged rank, as a multiple of a task adapter's
    name: str = "merge"
    evolving: bool = True
    inherits: bool = True

    def __post_init__(self) -> None:
        check_between(self.name, "density", self.density, 1e-4, 1)
        check_between(self.name, "rank_factor", self.rank_factor, 0.1, 64)
        if self.how not in HOWS:
            raise ContinualPlanInvalid(f"strategy merge: how is one of {', '.join(HOWS)}, not {self.how!r}")

    def served_rank(self, rank: int, stages: int) -> int:
        """The merge's, from the second stage on."""
        return rank if stages < 2 else max(rank, self._merged_rank(rank))

    def _merged_rank(self, rank: int) -> int:
        return max(1, round(rank * self.rank_factor))

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """The task, from nothing."""
        return Lesson(past.examples)

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """The merge of this task's adapter with all before."""
        kept = {"trained": trained}
        if past.previous is None:
            return Outcome(trained, kept)
        rank = self._merged_rank(max(pair.rank for pair in trained.values()))
        merged = merge([*(one.kept["trained"] for one in past.outcomes), trained], self.how, rank, self.density)
        return Outcome(merged.factors, kept, notes={"merge_error": merged.error})


@dataclass(frozen=True)
class Reducing:
    """Another strategy, whose served adapter loses a share of its intruder dimensions after every stage.

    What the strategy keeps for itself is not touched; a strategy that goes on from what was served goes on from the
    reduced adapter.
    """

    inner: Strategy
    share: float = 0.25  # of every intruder, taken out; see `intruders.reduce`
    name: str = field(init=False)
    evolving: bool = field(init=False)
    inherits: bool = field(init=False)

    def __post_init__(self) -> None:
        check_between("reduce_intruders", "share", self.share, 0, 1)
        object.__setattr__(self, "name", f"{self.inner.name}+reduced")
        object.__setattr__(self, "evolving", self.inner.evolving)
        object.__setattr__(self, "inherits", self.inner.inherits)

    def served_rank(self, rank: int, stages: int) -> int:
        """The inner strategy's."""
        return self.inner.served_rank(rank, stages)

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """The inner strategy's."""
        return self.inner.lesson(past)

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """The inner strategy's, reduced."""
        done = self.inner.finish(past, trained)
        reduced = intruders.reduce(past.weights(list(done.served)), done.served, self.share)
        notes = {**done.notes, "intruders_reduced": reduced.removed, "reduction_error": reduced.error}
        return Outcome(reduced.factors, done.kept, done.memory, notes)


def orthonormal(a: torch.Tensor) -> torch.Tensor:
    """The rows of `a` [r, in] made orthonormal by QR of aᵀ, R's diagonal positive, so that there is one answer."""
    q, r = torch.linalg.qr(a.T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)
    rows: torch.Tensor = (q * signs).T.contiguous()
    return rows
