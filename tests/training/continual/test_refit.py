"""`hub continual router` after a run, and a server in that precision that answers by what it wrote."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from hub.cli import group
from hub.hub import Hub
from server.adapters.directory import hub_fetch
from server.api.routing import Routing
from server.client import Client
from server.config import MIB, EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.errors import RouterMismatch
from server.router import Router
from tests.server.api.fakes import QUIET, RunningServer
from tests.training.continual.conftest import WORDS
from tests.training.continual.scripted import GOOD, THREE, ScriptedScorer, ScriptedTrainer
from tests.waiting import eventually
from training.continual.embedding import EngineEmbed
from training.continual.plan import ContinualPlan
from training.continual.run import Run
from training.continual.tasks import prepare_data
from training.data import Example, write_jsonl

KINDS = {"first": "0123456789", "second": "abcdefghij", "third": "~!#$%^&*()"}


@dataclass(frozen=True)
class Ran:
    """A finished run of three tasks, its router fitted on the unquantized base."""

    plan: Path
    directory: Path
    hub: Hub
    base: Path

    def refit(self, out: Path, *more: str, plan: Path | None = None, run: Path | None = None) -> Result:
        arguments = ["continual", "router", str(plan or self.plan), str(run or self.directory), "--out", str(out)]
        return CliRunner().invoke(group, [*arguments, "--threads", "1", *more])


@pytest.fixture
def ran(write_plan: Callable[..., Path], tiny_base: Path, tmp_path: Path) -> Iterator[Ran]:
    path = write_plan(THREE, strategy="isolated", intruders=False)
    for label, letters in KINDS.items():
        for part, count in (("train", 60), ("eval", 12)):
            asked = [letters[n % 10] * (20 + n % 7) + letters[n % 3] for n in range(count)]
            examples = [Example.of(user=f"{one} {part} {n}", answer=WORDS[label][0]) for n, one in enumerate(asked)]
            write_jsonl(tmp_path / f"{label}-{part}.jsonl", examples)
    plan, directory = ContinualPlan.read(path), tmp_path / "run"
    directory.mkdir()
    trainer: Any = ScriptedTrainer(tiny_base)
    with Hub.open(str(tmp_path / "hub")) as hub:
        data = prepare_data(plan, directory)
        embed = EngineEmbed(plan.base, plan.quantize, 1)
        Run(plan, directory, data, trainer, ScriptedScorer(GOOD), hub, Console(file=io.StringIO()), embed)()
        yield Ran(path, directory, hub, tiny_base)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_refitted_router_serves_its_precision_and_follows_promotions(
    ran: Ran, tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    done = ran.refit(tmp_path / "nf4", "--quantize", "nf4", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["quantization"], [row["adapter"] for row in told["tasks"]]) == (
        "nf4",
        [f"team/stream-{label}:prod" for label in THREE],
    )
    router = Router.read(tmp_path / "nf4")
    assert router.quantization == "nf4" and Router.read(ran.directory / "router").quantization == "none"
    questions = [
        one for task in prepare_data(ContinualPlan.read(ran.plan), ran.directory) for one in task.evaluation.examples
    ]
    read = EngineEmbed(str(ran.base), "nf4", 1)([questions])
    offline = [router.choose(row) for row in read.groups[0]]
    assert sum(choice.adapter is not None for choice in offline) > 18
    engine = Engine.build(
        ModelConfig(base=str(ran.base), quantization="nf4", threads=1),
        EngineLimits(kv_memory_bytes=8 * MIB, adapter_memory_bytes=4 * MIB),
        hub_fetch(ran.hub),
    )
    with pytest.raises(RouterMismatch, match="--quantize nf4 --out"):
        Routing.open([("three", ran.directory / "router")], engine, lambda *_: None)
    server = RunningServer(engine, ran.hub, replace(QUIET, routers=(("three", tmp_path / "nf4"),)))
    server.serve()
    try:
        with Client(server.address) as client:

            def ask(one: Example) -> Any:
                return client.generate([message.as_dict() for message in one.prompt], "auto", max_new_tokens=1)

            for one, wanted in zip(questions, offline, strict=True):
                answer = ask(one)
                assert answer.routing.distance == pytest.approx(wanted.distance, rel=0.05)
                if abs(wanted.distance - wanted.threshold) > 0.05 * wanted.threshold:
                    assert (answer.routing.chosen or None) == wanted.adapter
                versions = [wanted.adapter.replace(":prod", "@1")] if wanted.adapter else []
                if (answer.routing.chosen or None) == wanted.adapter:
                    assert [each.version for each in answer.adapters] == versions
            routed = next(one for one, choice in zip(questions, offline, strict=True) if choice.adapter)
            [first] = ask(routed).adapters
            name = first.version.removesuffix("@1")
            ran.hub.push(make_adapter(ran.base, tmp_path / "new", seed=5), name, base=str(ran.base))
            ran.hub.tag(f"{name}@2", "prod")
            assert eventually(lambda: ask(routed).adapters[0].version == f"{name}@2")
    finally:
        server.close()


def test_versions_are_named_where_asked_for_and_the_plans_precision_is_the_default(ran: Ran, tmp_path: Path) -> None:
    done = ran.refit(tmp_path / "pinned", "--pin")
    assert done.exit_code == 0, done.output
    assert "team/stream-third@1" in done.output and "serve with --quantize none" in done.output
    router, own = Router.read(tmp_path / "pinned"), Router.read(ran.directory / "router")
    assert router.names == tuple(f"team/stream-{label}@1" for label in THREE)
    assert router.centroids.equal(own.centroids) and router.thresholds.equal(own.thresholds)


def test_what_cannot_be_refitted_is_said_before_anything_is_read(
    ran: Ran, tmp_path: Path, write_plan: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "build", lambda *_: pytest.fail("a base was loaded"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "empty").mkdir()
    out, plan = tmp_path / "out", ran.plan.read_text()
    refused = {
        "there already": ran.refit(tmp_path / "taken"),
        "no continual run": ran.refit(out, run=tmp_path / "empty"),
    }
    ran.plan.write_text(plan.replace("isolated", "sequential"))
    refused["sequential has one adapter"] = ran.refit(out)
    ran.plan.write_text(plan.replace("seed: 3", "seed: 4"))
    refused["another plan"] = ran.refit(out)
    ran.plan.write_text(plan)
    state = ran.directory / "state.json"
    told = json.loads(state.read_text())
    for stage in told["stages"][1:]:
        stage["promoted"] = False
    state.write_text(json.dumps(told))
    refused["at least two tasks whose adapters were promoted"] = ran.refit(out)
    (tmp_path / "first-train.jsonl").write_bytes((tmp_path / "first-eval.jsonl").read_bytes())
    refused["data has changed"] = ran.refit(out)
    for words, result in refused.items():
        assert result.exit_code == 1 and words in str(result.exception), (words, result.exception)
    assert not out.exists()
