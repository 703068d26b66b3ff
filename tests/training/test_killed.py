"""A run killed by the system and taken up again, as a person would: two sittings, one result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from hub.cli import group
from tests.training.launching import HUB_IN_TWO_PROCESSES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("method", ["lora", "full", "qlora", "lora --variant dora"])
def test_a_killed_run_ends_as_if_it_had_not_been(tiny_base: Path, chat_file: Path, tmp_path: Path, method: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    asked = ["--base", str(tiny_base), "--method", *method.split(), "--accumulation", "2"]
    kill_at_step_12([sys.executable, "-c", "from hub.cli import main; main()"], arguments(chat_file, cut, asked))
    assert not cut.exists()
    for out, resume in ((whole, []), (cut, ["--resume"])):
        result = CliRunner().invoke(group, [*arguments(chat_file, out, asked), *resume], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    check_equal(whole, cut)


@pytest.mark.timeout(180)
def test_a_run_of_two_processes_killed_ends_as_if_it_had_not_been(
    tiny_base: Path, chat_file: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    asked = ["--base", str(tiny_base), "--method", "qlora", "--batch", "2", "--epochs", "6"]  # of four steps each
    kill_at_step_12(HUB_IN_TWO_PROCESSES, arguments(chat_file, cut, asked))
    assert not cut.exists() and not (tmp_path / "cut.checkpoints" / "checkpoint-20").exists()  # within an epoch
    for out, resume in ((whole, []), (cut, ["--resume"])):
        command = [*HUB_IN_TWO_PROCESSES, *arguments(chat_file, out, asked), *resume]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
    check_equal(whole, cut)
    assert json.loads((cut / "loraplex.json").read_text())["metrics"]["processes"] == 2


def arguments(data: Path, out: Path, asked: list[str]) -> list[str]:
    """A run with dropout, by default of 60 steps, validated at steps that are not its checkpoints'."""
    fixed = "--rank 4 --dropout 0.1 --epochs 30 --batch 4 --checkpoint-steps 5 --hold-out 0.2"
    fixed += " --validation-steps 7 --early-stop 1000 --learning-rate 1e-3 --max-length 200 --threads 1 --seed 3"
    return ["train", str(data), "--out", str(out), *fixed.split(), *asked, "--curves", f"{out}.json"]


def kill_at_step_12(launch: Sequence[str], run: list[str]) -> None:
    """All processes of the run at once, which leaves checkpoints and no more."""
    with subprocess.Popen(
        [*launch, *run], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "step 12/" in line:
                os.killpg(process.pid, signal.SIGKILL)
                break
        process.wait()
    assert process.returncode == -signal.SIGKILL, "".join(said)
    out = Path(run[run.index("--out") + 1])
    assert [*out.parent.glob(f"{out.name}.checkpoints/checkpoint-*")]


def check_equal(whole: Path, cut: Path) -> None:
    """Losses, weights and figures, to the last bit."""
    curves = [json.loads(Path(f"{out}.json").read_text()) for out in (whole, cut)]
    assert len(curves[0]["training"]) > 20
    assert curves[0]["training"] == curves[1]["training"] and curves[0]["validation"] == curves[1]["validation"]
    [name] = [path.name for path in whole.glob("*model.safetensors")]
    one, other = load_file(whole / name), load_file(cut / name)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    facts = [json.loads((out / "loraplex.json").read_text())["metrics"] for out in (whole, cut)]
    for key in ("steps", "validation_loss", "validation_loss_before", "validation_best_step", "train_loss_last"):
        assert facts[0][key] == facts[1][key]
