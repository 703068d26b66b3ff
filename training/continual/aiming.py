"""New rows for each task, aimed at that task's inputs by least squares: a strategy of ours.

A stage trains fresh rows beside all earlier ones, which stay bit for bit and answer along. Trained alone they would
change what every earlier input gives. So each matrix's new part ΔW = b a is replaced by the one that, over kept
examples, comes nearest to "ΔW on the new task's inputs, nothing on those of earlier tasks and of the text to keep":

    min over ΔW'  of  E_new ‖(ΔW' − ΔW) x‖² + Σ_others E ‖ΔW' x‖²      ΔW' = b a G_new (G_new + Σ_others G)⁻¹

with G = E[x xᵀ] of the inputs of that matrix. b is the same and only the rows of a are turned, so the result is a LoRA
of the same rank. The closed form is RegMean's (Jin et al. 2023, arXiv:2212.09849), for increments to one adapter
instead of whole models, with the base as one of the tasks; as there, what lies off G's diagonal is shrunk a little,
for the examples are few.

What aiming takes from the new task, training b once more gives back (`again`): with a held, whatever b becomes changes
little of what other inputs give, for a now answers them with little. Training b alone under a fixed a is InfLoRA's
(Liang and Li 2024, arXiv:2404.00228), which fixes a before anything is learned. Little is not nothing, and an answer
can hang on one token. So the rows may be aimed once more after that (`aim_last`), which takes little from the new task:
a is nearly what it would become.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import torch
from torch import Tensor

from training.continual.contract import Lesson, Outcome, Past, check_between
from training.continual.errors import ContinualPlanInvalid
from training.continual.factors import Factors, Pair, joined
from training.continual.replay import Line, sample
from training.continual.rules import SiteRule

E = TypeVar("E", bound=Line)
TIMES: Final = (1, 2, 4)  # the weights that are tried, in `own_weight`; the first of equally good ones is taken
_OFF_DIAGONAL: Final = 0.97
_RIDGE: Final = 1e-3  # of the mean diagonal of the sum


@dataclass(frozen=True)
class Aimed:
    """See above. The adapter grows by a recipe's rank a stage; kept examples are read again, never trained on.

    How much the new task weighs against each earlier one decides between learning and keeping. With `judges` it is
    taken from 1, 2 and 4 times `own_weight`: where the mean over all tasks so far of log(loss) is least, by kept
    examples of the earlier tasks and examples of the new one.
    """

    reads: int = 24  # examples of each task from which its inputs are known
    own_weight: float = 1.0  # of the new task against each earlier one: more learns more and forgets more
    keep_weight: float = 1.0  # of the text to keep against an earlier task, where the plan has such a text
    judges: int = 0  # examples of each task that choose the weight; 0: `own_weight` as it is
    again: float = 0.0  # passes in which b is trained once more with the aimed a, as a multiple of the recipe's
    aim_last: bool = False  # whether the rows are aimed once more after that
    name: str = "aimed"
    evolving: bool = True
    inherits: bool = True

    def __post_init__(self) -> None:
        check_between(self.name, "reads", self.reads, 1, 100_000)
        check_between(self.name, "own_weight", self.own_weight, 0.01, 1000)
        check_between(self.name, "keep_weight", self.keep_weight, 0, 1000)
        check_between(self.name, "judges", self.judges, 0, self.reads)
        check_between(self.name, "again", self.again, 0, 100)
        if self.aim_last and not self.again:
            raise ContinualPlanInvalid(f"strategy {self.name}: aim_last needs again; without, the rows are aimed last")

    def served_rank(self, rank: int, stages: int) -> int:
        """A fresh adapter's more every stage."""
        return rank * stages

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """The new task, in new rows."""
        if past.previous is None:
            return Lesson(past.examples)
        before = past.previous.served
        rules = {module: SiteRule(pair.rank) for module, pair in before.items()}
        return Lesson(past.examples, start=before, grow=True, rules=rules)

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """Earlier rows as they were, and the new ones aimed; with `again` their b trained once more.

        The notes are of the last time they were aimed.
        """
        new = sample(past.readable(past.examples), self.reads, f"keep:{past.seed}")
        kept = _by_task(past.outcomes)
        before: Factors | None = past.previous.served if past.previous else None
        nothing = {m: Pair(p.a.new_zeros(1, p.a.shape[1]), p.b.new_zeros(len(p.b), 1)) for m, p in trained.items()}
        others = past.inputs(before or nothing, [*((1.0, one) for one in kept), (self.keep_weight, None)])
        own = past.inputs(trained, [(1.0, new)])
        found = [
            _all_aimed(trained, before, own, others, self.own_weight * times)
            for times in (TIMES if self.judges and before is not None else (1,))
        ]
        best = 0
        if len(found) > 1:
            tasks = [one[: self.judges] for one in (*kept, new)]
            losses = past.losses([one.served for one in found], [row for rows in tasks for row in rows])
            best = int(np.argmin([_mean_log(each, [len(rows) for rows in tasks]) for each in losses]))
        served, notes = found[best].served, found[best].notes
        if self.again:
            rules = {m: SiteRule(before[m].rank if before else 0, still=True) for m in served}
            served = past.train(Lesson(past.examples, start=served, rules=rules, passes=self.again))
        if self.aim_last:
            last = _all_aimed(served, before, past.inputs(served, [(1.0, new)]), others, notes["own_weight"])
            served, notes = last.served, last.notes
        memory = (*(past.previous.memory if past.previous else ()), *new)
        return Outcome(served, memory=memory, notes=notes)


@dataclass(frozen=True)
class _Aimed:
    """One weight's answer."""

    served: Factors
    notes: dict[str, float]


def _all_aimed(
    trained: Factors, before: Factors | None, own: Mapping[str, Tensor], others: Mapping[str, Tensor], weight: float
) -> _Aimed:
    added = {}
    sums = {"own": [0.0, 0.0], "others": [0.0, 0.0]}  # energy after, before
    for module, pair in trained.items():
        rank = before[module].rank if before is not None else 0
        fresh = Pair(pair.a[rank:], pair.b[:, rank:])
        rest = others[module] if module in others else torch.zeros_like(own[module])
        added[module] = aimed(fresh, weight * own[module], rest)
        for name, moments in (("own", own[module]), ("others", rest)):
            for place, one in enumerate((added[module], fresh)):
                sums[name][place] += energy(one, moments)
    kept, left = ((after / first) ** 0.5 if first else 1.0 for after, first in sums.values())
    served = joined(before, added) if before is not None else added
    return _Aimed(served, {"own_weight": weight, "kept_on_own": kept, "left_on_others": left})


def _mean_log(losses: Sequence[float], sizes: Sequence[int]) -> float:
    """The mean over tasks of the logarithm of each one's mean loss; the losses are those of one task after another."""
    ends = np.cumsum(sizes)
    parts = [losses[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return float(np.mean([np.log(max(float(np.mean(part)), 1e-12)) for part in parts]))


def aimed(pair: Pair, own: Tensor, others: Tensor) -> Pair:
    """The nearest ΔW to `pair`'s on its own inputs that is nothing on the others'; b is the same.

    `own` and `others` are sums of E[x xᵀ], [in, in].
    """
    target, rest = _shrunk(own), _shrunk(others)
    whole = target + rest
    level = float(whole.diagonal().mean())
    if level == 0:
        return pair  # nothing ever comes in here
    whole.diagonal().add_(_RIDGE * level)
    turned = torch.linalg.solve(whole, target @ pair.a.double().T)  # [in, r]
    return Pair(turned.T.float().contiguous(), pair.b)


def energy(pair: Pair, moments: Tensor) -> float:
    """E ‖ΔW x‖² for inputs with these moments."""
    a, b, g = pair.a.double(), pair.b.double(), moments.double()
    return float(((b.T @ b) * (a @ g @ a.T)).sum().clamp(min=0))


def _shrunk(moments: Tensor) -> Tensor:
    exact = moments.double()
    return _OFF_DIAGONAL * exact + (1 - _OFF_DIAGONAL) * torch.diag(exact.diagonal())


def _by_task(outcomes: Sequence[Outcome[E]]) -> list[tuple[E, ...]]:
    """What each earlier stage has added to the memory."""
    sizes = [0, *(len(one.memory) for one in outcomes)]
    return [one.memory[begin:] for begin, one in zip(sizes, outcomes, strict=False)]
