"""Forgetting, measured: the matrix of every task after every stage, and the numbers the literature takes from it.

R[i][j] is the score of task j after stage i, both counted from 0 in the order of training; b[j] is the score of the
base before anything was trained. Scores lie in 0…1, larger is better. With k stages done:

    ACC   = mean of R[k-1][j] over j < k                               Lopez-Paz and Ranzato 2017, arXiv:1706.08840
    BWT   = mean of R[k-1][j] - R[j][j] over j < k-1                   the same; negative: forgotten
    FWT   = mean of R[j-1][j] - b[j] over 1 <= j < k                   the same; what a task gains before its stage
    F     = mean of max over i < k-1 of R[i][j], minus R[k-1][j], over j < k-1   Chaudhry et al. 2018, arXiv:1801.10112
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskChange:
    """What became of one task since its own stage."""

    task: str
    change: float  # R[k-1][j] - R[j][j]


@dataclass(frozen=True)
class Matrix:
    """Scores of all tasks after each finished stage, of the tasks yet to come as well."""

    tasks: tuple[str, ...]  # T names, in the order of training
    base: tuple[float, ...]  # b, [T]
    rows: tuple[tuple[float, ...], ...]  # R, k rows of [T], 1 <= k <= T

    def __post_init__(self) -> None:
        width = len(self.tasks)
        if not self.rows or len(self.rows) > width or any(len(row) != width for row in (self.base, *self.rows)):
            raise ValueError(f"a matrix over {width} tasks has 1 to {width} rows of {width} scores, and the base's row")

    @property
    def stages(self) -> int:
        """Finished stages, k."""
        return len(self.rows)

    @property
    def last(self) -> tuple[float, ...]:
        """The scores of the tasks learned so far, after the last stage."""
        return self.rows[-1][: self.stages]

    @property
    def accuracy(self) -> float:
        """ACC: the mean of the tasks learned so far, after the last stage."""
        return _mean(self.last)

    @property
    def backward_transfer(self) -> float | None:
        """BWT; None after one stage."""
        return _mean_or_none([self.last[j] - self.rows[j][j] for j in range(self.stages - 1)])

    @property
    def forward_transfer(self) -> float | None:
        """FWT; None after one stage."""
        return _mean_or_none([self.rows[j - 1][j] - self.base[j] for j in range(1, self.stages)])

    @property
    def forgetting(self) -> float | None:
        """F: how far below its best earlier score a task lies now, on the mean; None after one stage."""
        earlier = self.rows[:-1]
        return _mean_or_none([max(row[j] for row in earlier) - self.last[j] for j in range(self.stages - 1)])

    @property
    def worst(self) -> TaskChange | None:
        """The task that fell most since its own stage (or rose least); None after one stage."""
        changes = [TaskChange(self.tasks[j], self.last[j] - self.rows[j][j]) for j in range(self.stages - 1)]
        return min(changes, key=lambda one: one.change, default=None)

    def below(self, bound: Sequence[float]) -> float:
        """ACC minus the mean of a bound's scores [k] on the same tasks: negative where the bound is not reached.

        Bounds are other runs: each task alone (`isolated`), or all tasks at once (`joint`).
        """
        if len(bound) < self.stages:
            raise ValueError(f"the bound has {len(bound)} tasks, the run {self.stages}")
        return self.accuracy - _mean(bound[: self.stages])


def drift(base_nats: float, adapted_nats: float) -> float:
    """What adapting cost on text that is no task's, in nats a token; positive: the model predicts it worse."""
    return adapted_nats - base_nats


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_or_none(values: Sequence[float]) -> float | None:
    return _mean(values) if values else None
