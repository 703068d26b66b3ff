"""A sweep's cells are estimated for the machine as it computes in each cell's precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.planner import Machine
from training.presets import named_recipe
from training.sweep.estimate import Estimator
from training.sweep.plan import Cell
from training.sweep.records import TaskData

pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's:UserWarning")


def test_a_cell_is_estimated_in_its_own_precision(tiny_base: Path, chat_file: Path) -> None:
    asked = []

    def machine(precision: str) -> Machine:
        asked.append(precision)
        speed, dtype = {"float32": (1e9, torch.float32), "bfloat16": (4e9, torch.bfloat16)}[precision]
        return Machine("this", "cpu", 10**10, 0, speed, dtype)

    estimator = Estimator(tiny_base, machine)
    data = {"colours": TaskData(chat_file, chat_file, "", "")}
    cells = [
        Cell("colours", precision, precision, named_recipe("demo").but(precision=precision, batch=4, rank=rank))
        for rank in (4, 8)
        for precision in ("float32", "bfloat16")
    ]
    exact, rounded, *_ = [estimator.of(cell, data) for cell in cells]
    assert exact.seconds == 4 * rounded.seconds
    assert exact.memory != rounded.memory
    peaks = [estimator.rehearsal(cell, data).peak for cell in cells[:2]]
    assert peaks[1] < 0.75 * peaks[0]  # activations of half the size; the trained weights are float32 in both
    assert sorted(asked) == ["bfloat16", "float32"]
