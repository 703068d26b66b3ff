"""What processes hold beside tensors: numbers used as they are told, and found again where they were planted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmarks
from benchmarks.training_processes import Process, fit, page
from training.left_behind import BFLOAT16, FLOAT32, left_behind
from training.rehearsal import Rehearsal

REHEARSED = Rehearsal(
    weights=500, unpacked=0, gradients=10, optimizer=20, peak=1520, logits=70, linear_flops=1, attention_flops=1,
    trained=5, parameters=100,
)  # fmt: skip


def test_a_constant_and_shares_of_activations_and_logits() -> None:
    told = left_behind("lora", False, torch.float32)
    assert told.of(REHEARSED) == pytest.approx(told.constant + 1000 * told.activations + 70 * told.logits)
    more = replace(REHEARSED, logits=170)
    assert told.of(more) - told.of(REHEARSED) == pytest.approx(100 * told.logits)


@pytest.mark.parametrize(
    ("method", "checkpointing", "dtype", "found"),
    [
        ("full", False, torch.float32, FLOAT32[False, False]),
        ("lora", True, torch.float32, FLOAT32[False, True]),
        ("qlora", False, torch.float32, FLOAT32[True, False]),
        ("qlora", True, torch.bfloat16, BFLOAT16[True]),
        ("full", False, torch.bfloat16, BFLOAT16[False]),
    ],
)
def test_each_way_to_train_has_its_own(method: str, checkpointing: bool, dtype: torch.dtype, found: object) -> None:
    assert left_behind(method, checkpointing, dtype) is found


@pytest.mark.parametrize("measured", ["training_processes", "training_processes_float32"])
def test_no_process_that_was_measured_is_more_than_15_percent_off(measured: str) -> None:
    """The sweeps' processes as they were committed, by the numbers as they are now."""
    processes = json.loads((Path(benchmarks.__file__).parent / "results" / f"{measured}.json").read_text("utf-8"))
    assert len(processes) >= 10
    for one in processes:
        dtype = torch.float32 if one["precision"] == "float32" else torch.bfloat16
        told = left_behind("qlora" if one["nf4"] else "lora", one["checkpointing"], dtype)
        kept = told.constant + told.activations * one["activations"] + told.logits * one["logits"]
        assert one["tensors"] + kept == pytest.approx(one["measured"], rel=0.15), one["name"]


def cells(seed: int, count: int, noise: float) -> list[Process]:
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        tensors, activations, logits = (int(x) for x in random.uniform((1e9, 5e8, 1e6), (6e9, 5e9, 3e8)))
        nf4 = bool(number % 2)
        kept = 57e6 + 0.35 * activations + 5.0 * logits if nf4 else 33e6 + 0.14 * activations + 4.3 * logits
        measured = round((tensors + kept) * (1 + noise * random.standard_normal()))
        name = f"plan · task{number % 3} · seed {number // 12}"
        seconds = 2.0 * tensors / 1e9 * (1.25 if nf4 else 1.0)
        made.append(
            Process(
                name, "float32", nf4, False, measured, tensors, activations, logits, tensors, 86.0 * tensors, seconds
            )
        )
    return made


def test_the_fit_finds_what_was_planted() -> None:
    made = cells(np.random.SeedSequence().entropy % 2**32, 12, 0.0)
    for nf4, planted in ((False, [33e6, 0.14, 4.3]), (True, [57e6, 0.35, 5.0])):
        assert fit([cell for cell in made if cell.nf4 == nf4]) == pytest.approx(planted, rel=1e-3)


def test_the_page_checks_on_cells_that_had_no_part_in_the_fit() -> None:
    made = cells(7, 36, 0.005)
    spoilt = [*made[:-1], replace(made[-1], measured=2 * made[-1].measured)]
    told = page(spoilt, ["plan", "seed 0"], "command")
    assert "Fitted on the 12 cells of plan, seed 0:" in told
    assert told.count("| fit |") == 2 * 12 and told.count("| check |") == 2 * 24  # memory and time
    assert "On the 24 other cells, which had no part in it, the worst error is 5" in told  # half of what is there
    assert "over 43.0 GFLOP/s,\ntimes 1.25 with an NF4 base" in told
    assert "Of the 24 others 24 are within 15 %, the worst is 0% off" in told
    assert "| check |" not in page(spoilt, [], "command")
