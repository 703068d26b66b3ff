"""The page that holds `hub advise` to `hub train`: its arithmetic, and what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import benchmarks
from benchmarks.training_advice import BASES, Run, page, read

RUN = Run("smollm2-135m", "aws-summary", 160, 1, "auto", "lora", False, 1_100, 1_000, (90.0, 110.0), 80.0)


def test_errors_are_of_what_was_said() -> None:
    assert RUN.memory_error == pytest.approx(0.1) and RUN.time_error == pytest.approx(0.25)
    told = page([RUN, replace(RUN, said_seconds=(80.0, 82.0), rows=80, said_again=True)])
    assert "Of 2 runs 2 are within 15 % of the memory said and 1 of the time;" in told
    assert "the worst is 10% off in memory and 25% in time." in told
    assert "| 100 (90, 110) | 80 | +25% |" in told
    assert "--rows 160 --precision auto --write`\n" in told
    assert "--rows 80 --precision auto --write`, then the same with `--said-again`\n" in told


def test_what_was_measured_is_on_the_page_and_near_what_was_said() -> None:
    results = Path(benchmarks.__file__).parent / "results"
    runs = read()
    assert {run.base for run in runs} == set(BASES) and len({(run.method, run.checkpointing) for run in runs}) == 6
    assert all(abs(run.memory_error) < 0.2 and abs(run.time_error) < 0.2 for run in runs)
    assert page(runs) == (results / "training_advice.md").read_text("utf-8")
