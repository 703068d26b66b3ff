"""Replay that goes only as far as the kept examples allow: a strategy of ours.

A stage trains as `replay` does, from the adapter before it. What is served is the point between the two,

    ΔW = ΔW_before + λ (ΔW_trained − ΔW_before)

with that λ of 1, ¾, ½ and ¼ at which all tasks so far are answered best, by the loss on kept examples of the earlier
tasks and on examples of the new one. Between a model and its fine-tune there are often better models than both
(Wortsman et al. 2022, arXiv:2109.01903); there a fixed λ is taken, and nothing is kept to choose it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np

from training.continual.contract import Lesson, Outcome, Past, check_between
from training.continual.factors import Factors, Pair, compressed, joined
from training.continual.replay import Line, sample
from training.continual.strategies import Replay

E = TypeVar("E", bound=Line)
STEPS: Final = (1.0, 0.75, 0.5, 0.25)  # λ; the first of equally good ones is taken


@dataclass(frozen=True)
class PacedReplay:
    """See above. The new task's examples that judge were trained on once, so λ is rather too large than too small."""

    share: float = 0.05  # of a stage's examples
    capacity: int = 500  # examples kept, all tasks together
    judges: int = 32  # examples of the earlier tasks, and of the new one, that choose λ
    name: str = "paced-replay"
    evolving: bool = True
    inherits: bool = True

    def __post_init__(self) -> None:
        check_between(self.name, "judges", self.judges, 1, 100_000)
        self._replay()

    def _replay(self) -> Replay:
        return Replay(self.share, self.capacity, name=self.name)

    def served_rank(self, rank: int, stages: int) -> int:
        """A fresh adapter's."""
        return rank

    def lesson(self, past: Past[E]) -> Lesson[E]:
        """As `replay`."""
        return self._replay().lesson(past)

    def finish(self, past: Past[E], trained: Factors) -> Outcome[E]:
        """The best point on the way from the adapter before to the trained one."""
        done: Outcome[E] = self._replay().finish(past, trained)
        before = past.previous
        if before is None or not before.memory:
            return done
        old = sample(past.readable(before.memory), self.judges, f"judge:{past.seed}:{past.stage}")
        new = sample(past.readable(past.examples), self.judges, f"judge:{past.seed}:{past.stage}")
        points = [between(before.served, trained, step) for step in STEPS]
        losses = [weighed(each, len(old), past.stage) for each in past.losses([one for one, _ in points], (*old, *new))]
        best = int(np.argmin(losses))
        served, error = points[best]
        return Outcome(served, done.kept, done.memory, {"step": STEPS[best], "step_error": error})


def between(before: Factors, trained: Factors, step: float) -> tuple[dict[str, Pair], float]:
    """(the point between two adapters on ΔW, of the trained one's ranks, ‖what those leave out‖ / ‖ΔW‖)."""
    if step == 1:
        return dict(trained), 0.0
    part = joined(_scaled(before, 1 - step), _scaled(trained, step))
    found, size, lost = {}, 0.0, 0.0
    for module, pair in part.items():
        found[module], error = compressed(pair, trained[module].rank)
        norm = pair.norm() ** 2
        size, lost = size + norm, lost + norm * error**2
    return found, (lost / size) ** 0.5 if size else 0.0


def weighed(losses: Sequence[float], old: int, tasks: int) -> float:
    """The mean loss over tasks: the first `old` are those of `tasks` earlier ones, the others of the new one."""
    return float(tasks * np.mean(losses[:old]) + np.mean(losses[old:])) / (tasks + 1)


def _scaled(factors: Factors, by: float) -> dict[str, Pair]:
    return {module: Pair(pair.a, pair.b * by) for module, pair in factors.items()}
