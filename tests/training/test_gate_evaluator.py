"""A promotion's gate runs the evaluation it names, on the engine that serves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hub.cli import group
from hub.errors import GateMalformed, GateRefused
from hub.gate_evaluation import find_evaluator
from hub.hub import Hub
from training.data import Example, write_jsonl
from training.gate_evaluator import measure


@pytest.fixture
def world(tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    labels = ["positive", "negative", "neutral", "mixed"] * 2
    write_jsonl(tmp_path / "eval.jsonl", [Example.of(user=f"text {n}", answer=label) for n, label in enumerate(labels)])
    with Hub.open(str(tmp_path / "hub")) as hub:
        for seed in (1, 2):
            hub.push(make_adapter(tiny_base, tmp_path / f"a{seed}", seed=seed, r=4), "team/x", base=str(tiny_base))
        hub.tag("team/x@1", "prod")
    return tmp_path


def promote(world: Path, gate: str) -> Result:
    (world / "gate.toml").write_text(gate)
    wanted = ["promote", "team/x@2", "prod", "--gate", str(world / "gate.toml"), "--hub", str(world / "hub"), "--json"]
    return CliRunner().invoke(group, wanted)


def test_the_installed_evaluator_is_found() -> None:
    assert find_evaluator() is measure


def test_a_promotion_is_decided_by_what_is_measured_now(world: Path, tiny_base: Path) -> None:
    evaluation = f'[evaluate]\ntask = "sentiment"\ndata = "eval.jsonl"\nlimit = 4\nbase = "{tiny_base}"\n'
    refused = promote(world, f'require = ["accuracy >= 0.99"]\nno_lower = {{parse_rate = 1}}\n{evaluation}')
    assert isinstance(refused.exception, GateRefused), refused.output
    assert ">= 0.99" in str(refused.exception)  # a random model labels nothing right
    done = promote(world, f'require = ["accuracy <= 0.99"]\nno_lower = {{parse_rate = 1}}\n{evaluation}')
    assert done.exit_code == 0, (done.output, done.exception)
    told = json.loads(done.stdout)
    scored = json.loads(
        CliRunner().invoke(
            group,
            ["eval", "team/x@2", "--task", "sentiment", "--data", str(world / "eval.jsonl"), "--limit", "4", "--base",
             str(tiny_base), "--hub", str(world / "hub"), "--threads", "1", "--json"],
        ).stdout
    )  # fmt: skip
    assert told["measured"] == pytest.approx(scored["models"]["team/x@2"])
    assert told["evaluation"].startswith("sentiment, 4 examples, data sha256:")
    with Hub.open(str(world / "hub")) as hub:
        assert hub.resolve("team/x:prod").number == 2
        assert "sentiment, 4 examples" in (hub.events()[-1].note or "")


def test_an_evaluation_that_cannot_be_run_moves_nothing(world: Path) -> None:
    for table in ('task = "juggling"\ndata = "eval.jsonl"', 'task = "sentiment"\ndata = "missing.jsonl"',
                  'task = "sentiment"\ndata = "eval.jsonl"\nquantize = "int3"'):  # fmt: skip
        result = promote(world, f'require = ["accuracy >= 0"]\n[evaluate]\n{table}')
        assert isinstance(result.exception, GateMalformed), result.output
    with Hub.open(str(world / "hub")) as hub:
        assert hub.resolve("team/x:prod").number == 1
