"""Gates that name an evaluation: what is measured counts, for the version and for what the alias holds then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hub.cli import group
from hub.errors import AliasMoved, GateMalformed, GateRefused
from hub.facts import Facts
from hub.gate import Gate
from hub.gate_evaluation import Evaluation, Measured, Scores
from hub.hub import Hub
from tests.hub.making import lora_tensors, write_adapter

GATE = b"""
require = ["f1 >= 0.8"]
no_lower = {f1 = 0.01}
[evaluate]
task = "sentiment"
data = "eval.jsonl"
limit = 20
"""


def adapter(tmp_path: Path, seed: int, **metrics: Any) -> Path:
    directory = write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))
    Facts(metrics=metrics).write(directory)
    return directory


def test_a_gate_names_its_evaluation(tmp_path: Path) -> None:
    (tmp_path / "gate.toml").write_bytes(GATE)
    gate = Gate.read(tmp_path / "gate.toml")
    assert gate.evaluation == Evaluation("sentiment", tmp_path / "eval.jsonl", 20)
    conditions = b'require = ["f1 > 0"]\n[evaluate]\n'
    for table in (b"", b"task = 'x'", b"data = 'x'", b"task = 3\ndata = 'x'", b"task = 'x'\ndata = 'x'\nlimit = 0",
                  b"task = 'x'\ndata = 'x'\nlimit = true", b"task = 'x'\ndata = 'x'\nshell = 'rm'",
                  b"task = ''\ndata = 'x'"):  # fmt: skip
        with pytest.raises(GateMalformed, match="evaluate"):
            Gate.parse(conditions + table)
    with pytest.raises(GateMalformed, match="asks for nothing"):
        Gate.parse(b"[evaluate]\ntask = 'x'\ndata = 'x'")


def test_what_was_measured_counts_before_what_was_recorded(hub: Hub, tmp_path: Path) -> None:
    gate = Gate.parse(GATE)
    held = hub.push(adapter(tmp_path, 1, f1=0.95), "x:prod").version
    hub.push(adapter(tmp_path, 2, f1=0.99), "x")
    with pytest.raises(GateRefused) as caught:
        hub.promote("x@2", "prod", gate, Scores({"f1": 0.7}, {"f1": 0.75}, held.digest, "sentiment, 20 examples"))
    assert "f1 0.7 >= 0.8" in str(caught.value) and "f1 0.7 >= 0.74 (x@1 has 0.75)" in str(caught.value)
    # Both were measured: the 0.95 that was recorded once is no bound.
    done = hub.promote("x@2", "prod", gate, Scores({"f1": 0.81}, {"f1": 0.75}, held.digest, "sentiment, 20 examples"))
    assert done.passed == ("f1 0.81 >= 0.8", "f1 0.81 >= 0.74 (x@1 has 0.75)")
    note = hub.events()[-1].note or ""
    assert "f1 0.81 >= 0.8" in note and note.endswith("sentiment, 20 examples")


def test_an_alias_that_moved_while_it_was_measured_is_not_moved_again(hub: Hub, tmp_path: Path) -> None:
    gate = Gate.parse(GATE)
    held = hub.push(adapter(tmp_path, 1), "x:prod").version
    hub.push(adapter(tmp_path, 2), "x:prod")
    hub.push(adapter(tmp_path, 3), "x")
    for scores in (Scores({"f1": 0.9}, {"f1": 0.1}, held.digest), Scores({"f1": 0.9})):
        with pytest.raises(AliasMoved):
            hub.promote("x@3", "prod", gate, scores)
    assert hub.resolve("x:prod").number == 2


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """An evaluator that gives version n an f1 of 0.n; what it was asked."""
    asked: list[Any] = []

    def evaluate(evaluation: Evaluation, refs: Sequence[str], hub_url: str | None) -> Measured:
        asked.append((evaluation, list(refs), hub_url))
        with Hub.open(hub_url) as hub:
            return Measured(tuple({"f1": hub.resolve(ref).number / 10} for ref in refs), "sentiment, 20 examples")

    monkeypatch.setattr("hub.cli_promote.find_evaluator", lambda: evaluate)
    return asked


def test_the_verb_measures_both_and_tells_the_number_that_failed(tmp_path: Path, measured: list[Any]) -> None:
    url = str(tmp_path / "hub")
    with Hub.open(url) as hub:
        for seed in range(1, 10):
            hub.push(adapter(tmp_path, seed), "team/x")
        hub.tag("team/x@9", "prod")
        digests = [hub.resolve(f"team/x@{number}").digest for number in (7, 8, 9)]
    (tmp_path / "gate.toml").write_bytes(GATE)

    def promote(ref: str, alias: str) -> Any:
        gate = str(tmp_path / "gate.toml")
        return CliRunner().invoke(group, ["promote", ref, alias, "--gate", gate, "--hub", url, "--json"])

    refused = promote("team/x@7", "prod")
    assert isinstance(refused.exception, GateRefused)
    assert "f1 0.7 >= 0.8" in str(refused.exception) and "f1 0.7 >= 0.89 (team/x@9 has 0.9)" in str(refused.exception)
    assert measured[-1][1] == [f"team/x@{digests[0]}", f"team/x@{digests[2]}"]
    assert isinstance(promote("team/x@8", "prod").exception, GateRefused)
    told = promote("team/x@8", "new")
    assert told.exit_code == 0, told.output
    assert '"f1": 0.8' in told.stdout and "sentiment, 20 examples" in told.stdout
    assert measured[-1][1] == [f"team/x@{digests[1]}"]  # the alias holds nothing to compare with
    with Hub.open(url) as hub:
        assert {alias: each.version for alias, each in hub.aliases("team/x").items()} == {
            "latest": 9, "prod": 9, "new": 8,
        }  # fmt: skip


def test_without_an_evaluator_the_gate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.gate_evaluation.entry_points", lambda group: {})
    with Hub.open(str(tmp_path / "hub")) as hub:
        hub.push(adapter(tmp_path, 1, f1=0.9), "x")
    (tmp_path / "gate.toml").write_bytes(GATE)
    wanted = ["promote", "x", "prod", "--gate", str(tmp_path / "gate.toml"), "--hub", str(tmp_path / "hub")]
    result = CliRunner().invoke(group, wanted)
    assert isinstance(result.exception, GateMalformed) and "loraplex[train]" in str(result.exception)
