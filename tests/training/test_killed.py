"""A run killed by the system and taken up again, as a person would: two processes, one result."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from hub.cli import group

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.mark.timeout(180)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_killed_run_ends_as_if_it_had_not_been(tiny_base: Path, chat_file: Path, tmp_path: Path, method: str) -> None:
    def arguments(out: Path) -> list[str]:
        fixed = "--rank 4 --dropout 0.1 --epochs 30 --batch 4 --accumulation 2 --checkpoint-steps 5 --hold-out 0.2"
        fixed += " --validation-steps 7 --early-stop 1000 --learning-rate 1e-3 --max-length 200 --threads 1 --seed 3"
        return [
            "train", str(chat_file), "--base", str(tiny_base), "--method", method, "--out", str(out), *fixed.split(),
            "--curves", f"{out}.json",
        ]  # fmt: skip

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code = "from hub.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments(cut)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "step 12/60" in line:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    assert process.returncode == -signal.SIGKILL and not cut.exists(), "".join(said)
    checkpoints = sorted(path.name for path in tmp_path.glob("cut.checkpoints/checkpoint-*"))
    assert checkpoints and "checkpoint-60" not in checkpoints

    for out, resume in ((whole, []), (cut, ["--resume"])):
        result = CliRunner().invoke(group, [*arguments(out), *resume], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    curves = [json.loads(Path(f"{out}.json").read_text()) for out in (whole, cut)]
    assert len(curves[0]["training"]) == 60
    assert curves[0]["training"] == curves[1]["training"] and curves[0]["validation"] == curves[1]["validation"]
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    one, other = load_file(whole / name), load_file(cut / name)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    facts = [json.loads((out / "loraplex.json").read_text())["metrics"] for out in (whole, cut)]
    for key in ("steps", "validation_loss", "validation_loss_before", "validation_best_step", "train_loss_last"):
        assert facts[0][key] == facts[1][key]
