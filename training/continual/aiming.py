"""New rows for each task, aimed at that task's inputs by least squares: a strategy of ours.

A stage trains fresh rows beside all earlier ones, which stay bit for bit and answer along. Trained alone they would
change what every earlier input gives. So each matrix's new part ΔW = b a is replaced by the one that, over kept
examples, comes nearest to "ΔW on the new task's inputs, nothing on those of earlier tasks and of the text to keep":

    min over ΔW'  of  E_new ‖(ΔW' − ΔW) x‖² + Σ_others E ‖ΔW' x‖²      ΔW' = b a G_new (G_new + Σ_others G)⁻¹

with G = E[x xᵀ] of the inputs of that matrix. b is the same and only the rows of a are turned, so the result is a LoRA
of the same rank. The closed form is RegMean's (Jin et al. 2023, arXiv:2212.09849), for increments to one adapter
instead of whole models, with the base as one of the tasks; as there, what lies off G's diagonal is shrunk a little,
for the examples are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor

from training.continual.factors import Factors, Pair, joined
from training.continual.replay import Line, sample
from training.continual.rules import SiteRule
from training.continual.strategies import Lesson, Outcome, Past, check_between

E = TypeVar("E", bound=Line)
_OFF_DIAGONAL: Final = 0.97
_RIDGE: Final = 1e-3  # of the mean diagonal of the sum


@dataclass(frozen=True)
class Aimed:
    """See above. The adapter grows by a recipe's rank a stage; kept examples are read again, never trained on."""

    reads: int = 24  # examples of each task from which its inputs are known
    own_weight: float = 1.0  # of the new task against each earlier one: more learns more and forgets more
    keep_weight: float = 1.0  # of the text to keep against an earlier task, where the plan has such a text
    name: str = "aimed"
    evolving: bool = True
    inherits: bool = True

    def __post_init__(self) -> None:
        check_between(self.name, "reads", self.reads, 1, 100_000)
        check_between(self.name, "own_weight", self.own_weight, 0.01, 1000)
        check_between(self.name, "keep_weight", self.keep_weight, 0, 1000)

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """The new task, in new rows."""
        if past.previous is None:
            return Lesson(past.examples)
        before = past.previous.served
        rules = {module: SiteRule(pair.rank) for module, pair in before.items()}
        return Lesson(past.examples, start=before, grow=True, rules=rules)

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """Earlier rows as they were, and the new ones aimed."""
        new = sample(past.examples, self.reads, f"keep:{past.seed}")
        before: Factors | None = past.previous.served if past.previous else None
        nothing = {m: Pair(p.a.new_zeros(1, p.a.shape[1]), p.b.new_zeros(len(p.b), 1)) for m, p in trained.items()}
        old = [(1.0, kept) for kept in _by_task(past.outcomes)]
        read = past.inputs(before or nothing, [*old, (self.keep_weight, None)])
        own = past.inputs(trained, [(self.own_weight, new)])
        added, stays, leaks, leaked = {}, [0.0, 0.0], 0.0, 0.0
        for module, pair in trained.items():
            rank = before[module].rank if before is not None else 0
            fresh = Pair(pair.a[rank:], pair.b[:, rank:])
            others = read[module] if module in read else torch.zeros_like(own[module])
            added[module] = aimed(fresh, own[module], others)
            stays[0] += energy(added[module], own[module])
            stays[1] += energy(fresh, own[module])
            leaks, leaked = leaks + energy(added[module], others), leaked + energy(fresh, others)
        notes = {
            "kept_on_own": (stays[0] / stays[1]) ** 0.5 if stays[1] else 1.0,
            "left_on_others": (leaks / leaked) ** 0.5 if leaked else 0.0,
        }
        memory = (*(past.previous.memory if past.previous else ()), *new)
        return Outcome(joined(before, added) if before is not None else added, memory=memory, notes=notes)


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
