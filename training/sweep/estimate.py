"""How long a sweep's training would take, by the planner: counted operations over this machine's measured speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from training.planner import Data, Machine, flops_of, peak_in_process, read_data, seconds_of
from training.rehearsal import Rehearsal, rehearse
from training.sweep.plan import Cell
from training.sweep.records import TaskData


@dataclass(frozen=True)
class Estimate:
    """One cell's training; scoring is not in it."""

    seconds: float
    memory: int  # bytes at the peak, the process around it included


class Estimator:
    """Estimates cells; what several have in common is rehearsed once.

    `machine` is the machine as it computes in a recipe's precision; it is asked once for each.
    """

    def __init__(self, base: Path, machine: Callable[[str], Machine]) -> None:
        self._base = base
        self._machine = cache(machine)
        self._data: dict[tuple[Any, ...], Data] = {}
        self._rehearsed: dict[tuple[Any, ...], Rehearsal] = {}

    def of(self, cell: Cell, data: Mapping[str, TaskData]) -> Estimate:
        """One cell's."""
        recipe, rehearsal = cell.recipe, self.rehearsal(cell, data)
        machine = self._machine(recipe.precision)
        return Estimate(
            seconds_of(rehearsal, self._sizes(cell, data), recipe, recipe.method, machine),
            peak_in_process(self._base, recipe, recipe.method, rehearsal, machine) + machine.overhead,
        )

    def operations(self, cell: Cell, data: Mapping[str, TaskData]) -> float:
        """Of the cell's whole training."""
        return flops_of(self.rehearsal(cell, data), self._sizes(cell, data), cell.recipe)

    def rehearsal(self, cell: Cell, data: Mapping[str, TaskData]) -> Rehearsal:
        """One step of the cell, on its largest batch."""
        recipe, sizes = cell.recipe, self._sizes(cell, data)
        shaping = (
            recipe.method, recipe.rank, recipe.targets, recipe.variant, recipe.dropout > 0,
            recipe.gradient_checkpointing, recipe.accumulation > 1, recipe.max_length <= 512, recipe.precision,
            sizes.longest,
        )  # fmt: skip
        if shaping not in self._rehearsed:
            machine = self._machine(recipe.precision)
            self._rehearsed[shaping] = rehearse(
                self._base, recipe.method, recipe, sizes.longest, machine.device, machine.dtype
            )
        return self._rehearsed[shaping]

    def _sizes(self, cell: Cell, data: Mapping[str, TaskData]) -> Data:
        recipe = cell.recipe
        sizing = (cell.task, recipe.batch, recipe.max_length, recipe.hold_out, recipe.seed)
        if sizing not in self._data:
            self._data[sizing] = read_data(data[cell.task].train, self._base, recipe)
        return self._data[sizing]
