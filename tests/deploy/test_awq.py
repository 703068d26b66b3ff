"""The AWQ script's own parts; the library it calls has an environment of its own and is not here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.answer_loss import answer_losses
from training.data import Example, Message, write_jsonl

SCRIPT = Path(__file__).parents[2] / "deploy" / "awq.py"
EXAMPLES = [
    Example(
        (Message("system", "Be brief."), Message("user", "one two"), Message("assistant", "three four five")), None
    ),
    Example((Message("user", "red"), Message("assistant", "blue, and then green")), None),
]


@pytest.fixture(scope="module")
def awq() -> ModuleType:
    spec = importlib.util.spec_from_file_location("awq_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_cost_what_the_evaluation_says(awq: ModuleType, tiny_base: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "check.jsonl", EXAMPLES)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    asked = awq.conversations(tmp_path / "check.jsonl", 50)
    assert len(asked) == len(EXAMPLES)
    told = awq.answer_nats(model, AutoTokenizer.from_pretrained(tiny_base), asked)
    measured = answer_losses(tiny_base, {}, EXAMPLES, quantized=False)[None]
    assert told == pytest.approx(measured.value, rel=1e-4)


def test_groups_divide_the_inputs_of_every_layer_but_the_head(awq: ModuleType) -> None:
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(576, 8), "b": torch.nn.Linear(1536, 8)})
    assert awq.group_size(layers) == 64
    layers["lm_head"] = torch.nn.Linear(7, 8)
    assert awq.group_size(layers) == 64
    layers["c"] = torch.nn.Linear(24, 8)
    assert awq.group_size(layers) == 8


def test_without_the_library_it_says_how_to_get_it(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "merged", str(tmp_path / "out"), "--calibration", "a", "--check", "b"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install torch llmcompressor" in done.stderr
    assert not (tmp_path / "out").exists()
