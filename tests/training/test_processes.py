"""A run in two processes, started as a person would, is the run of one process with twice the forwards a step."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from hub.cli import group
from tests.training.launching import HUB_IN_TWO_PROCESSES
from training.processes import Processes, as_forward, threads_here

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def arguments(base: Path, data: Path, out: Path, accumulation: int) -> list[str]:
    fixed = "--rank 4 --dropout 0 --epochs 3 --batch 4 --checkpoint-steps 4 --hold-out 0.2 --validation-steps 2"
    fixed += " --early-stop 1000 --learning-rate 5e-3 --max-length 200 --threads 1 --seed 3"
    return [
        "train", str(data), "--base", str(base), "--out", str(out), *fixed.split(),
        "--accumulation", str(accumulation), "--curves", f"{out}.json", "--json",
    ]  # fmt: skip


@pytest.mark.timeout(180)
def test_two_processes_are_one_with_twice_the_accumulation(tiny_base: Path, chat_file: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = CliRunner().invoke(group, arguments(tiny_base, chat_file, one, 2), catch_exceptions=False)
    assert alone.exit_code == 0, alone.output
    launched = subprocess.run(
        [*HUB_IN_TWO_PROCESSES, *arguments(tiny_base, chat_file, two, 1)], capture_output=True, text=True, timeout=150
    )
    assert launched.returncode == 0, launched.stderr
    assert json.loads(launched.stdout)["out"] == str(two)  # the first one spoke, and it alone
    assert launched.stderr.count("done in") == 1
    assert "2 processes, cpu" in launched.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat.jsonl", "one", "one.json", "two", "two.json",
    ]  # fmt: skip

    single, double = (json.loads((path / "loraplex.json").read_text())["metrics"] for path in (one, two))
    assert (single["processes"], double["processes"]) == (1, 2)
    assert single["steps"] == double["steps"] == 6
    rough = single["precision"] != "float32"  # bfloat16 rounds what is added in another order
    curves = [json.loads(path.with_suffix(".json").read_text()) for path in (one, two)]
    # A step's training loss is the mean over its forwards, which weigh the same with one process and not with two.
    for kind, rtol in (("training", 1e-2), ("validation", 2e-2 if rough else 1e-4)):
        assert [step for step, _ in curves[0][kind]] == [step for step, _ in curves[1][kind]]
        losses = [torch.tensor([loss for _, loss in each[kind]]) for each in curves]
        torch.testing.assert_close(losses[1], losses[0], rtol=rtol, atol=0)
    weights, others = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    moved = 0.0
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=5e-2 if rough else 1e-3, atol=5e-3 if rough else 1e-5)
        if "lora_B" in name:
            moved = max(moved, float(tensor.abs().max()))
    assert moved > 1e-2  # B began at zero: what is compared was learned


def test_alone_there_is_nothing_to_join(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Processes.here()
    assert (here.count, here.number, here.first) == (1, 0, True)
    assert here.added([1.5, 2.0]) == [1.5, 2.0]
    here.wait()
    cores = threads_here()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    assert threads_here() == 1


def test_what_is_no_ddp_computes_as_it_is() -> None:
    linear = nn.Linear(2, 2)
    assert as_forward(linear, lambda: 5) == 5
    assert "forward" not in vars(linear)
