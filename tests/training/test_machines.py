"""The measurement behind the planner's times on the machine at hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from training import machines, trainable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layers_speed_is_its_operations_over_the_shortest_time(tiny_base: Path, dtype: torch.dtype) -> None:
    """Counted by hand: products with frozen weights once more in the backward pass, attention's twice."""
    config = json.loads((tiny_base / "config.json").read_text())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = config["num_key_value_heads"] * head
    weights = 2 * hidden * heads * head + 2 * hidden * keys + 3 * hidden * inner + hidden * 256  # with the logits'
    rows, tokens = 4, 128
    attention = 2 * 2 * rows * heads * tokens * tokens * head
    ticks = itertools.chain([0.0, 5.0], [10.0, 12.0], itertools.count(20.0, 7.0))  # the shortest step takes 2
    found = machines.layer_speed(tiny_base, dtype, seconds=0.5, clock=lambda: next(ticks))
    products = 2 * 2 * rows * tokens * weights
    assert found * 2.0 == products + 3 * attention


def test_an_update_is_a_parameters_share_of_the_shortest_step() -> None:
    ticks = itertools.chain([0.0, 5.0], [10.0, 12.0], itertools.count(20.0, 7.0))
    assert machines.update_seconds(1000, seconds=0.1, clock=lambda: next(ticks)) == 2.0 / 1000


def test_one_threads_time_is_what_the_processor_gave_it(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that others use too, the wall's clock made planned trainings take twice as long."""
    asked: list[str] = []
    for name in ("process_time", "perf_counter"):
        monkeypatch.setattr(machines.time, name, lambda name=name: asked.append(name) or float(len(asked)))
    for threads, clock in ((1, "process_time"), (2, "perf_counter")):
        asked.clear()
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        machines.update_seconds(1000, seconds=0.0)
        assert set(asked) == {clock}


def test_this_machine_is_planned_for_by_that_speed(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def speed(base: Path, dtype: torch.dtype) -> float:
        asked.append((base, dtype))
        return 100e9

    monkeypatch.setattr(machines, "layer_speed", speed)
    monkeypatch.setattr(machines, "update_seconds", lambda: 2e-9)
    monkeypatch.setattr(trainable, "bfloat16_is_fast", lambda device: True)
    found = machines.this_machine(tiny_base, memory=8 * 10**9)
    assert asked == [(tiny_base, torch.bfloat16)] and found.dtype is torch.bfloat16
    assert (
        found.flops == 100e9 * machines.CPU_SHARE
        and found.update == 2e-9
        and found.memory == 8 * 10**9
        and found.device == "cpu"
    )
    assert machines.this_machine(tiny_base, None, "float32").dtype is torch.float32
    assert asked[1:] == [(tiny_base, torch.float32)]
