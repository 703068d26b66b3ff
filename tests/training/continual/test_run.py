"""Whole runs: versions and lineage, gates, resuming after every kind of end, the report."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hub.cli import group
from hub.hub import Hub
from hub.refs import AdapterRef
from server.router import Router
from tests.training.continual.scripted import FORGETS, GOOD, THREE, ScriptedScorer, ScriptedTrainer
from training.continual import answer_nats
from training.continual import run as run_module
from training.continual.embedding import Embedded
from training.continual.errors import BoundMismatch, RunMismatch, RunMissing
from training.continual.gates import Gates, judge
from training.continual.plan import ContinualPlan
from training.continual.record import RunRecord
from training.continual.registry import KINDS
from training.continual.report import as_markdown, summary, write_report
from training.continual.run import Run
from training.continual.scoring import Cell
from training.continual.tasks import prepare_data
from training.data import Example


def said(run: Run) -> str:
    file: Any = run.console.file
    return str(file.getvalue())


def test_stages_become_versions_with_lineage_and_prod_follows(make_run: Callable[..., Run], hub: Hub) -> None:
    run = make_run(ScriptedScorer(GOOD), strategy={"name": "replay", "share": 0.1, "capacity": 10})
    record = run()
    assert [stage.version for stage in record.stages] == [f"team/stream@{n}" for n in (1, 2, 3)]
    assert [stage.promoted for stage in record.stages] == [True] * 3
    assert hub.aliases("team/stream")["prod"].version == 3
    lineage = hub.lineage(AdapterRef.parse("team/stream@3"))
    assert [one.version.text for one in lineage.ancestors if one.version] == ["team/stream@2", "team/stream@1"]
    assert record.matrix.rows == GOOD and record.base_row == (0.1,) * 3
    manifest = hub.resolve("team/stream@2").manifest
    assert manifest.metrics["scores"] == dict(zip(THREE, GOOD[1], strict=True))
    assert manifest.recipe["continual"]["tasks"] == ["first", "second"]
    memory = manifest.datasets["memory"]  # type: ignore[call-overload]
    assert memory == {"examples": 10, "digest": record.stages[1].memory_digest}
    assert record.stages[1].notes["replayed"] == 3  # 0.1 of all: 24 new ones
    scorer: Any = run.scorer
    assert [len(cells) for cells in scorer.cells] == [6, 3, 3]  # the base once, all adapters of a stage in one call
    again = make_run(ScriptedScorer(()), strategy={"name": "replay", "share": 0.1, "capacity": 10})
    assert again() == record  # nothing left to do, nothing asked


def test_a_stage_that_forgets_is_kept_and_not_promoted(make_run: Callable[..., Run], hub: Hub) -> None:
    run = make_run(ScriptedScorer(FORGETS), gates={"max_drop": 0.05})
    record = run()
    assert hub.aliases("team/stream")["prod"].version == 2
    assert hub.resolve("team/stream@3").manifest.parents == (hub.resolve("team/stream@2").digest,)
    assert record.stages[2].refusals == ("first fell by 0.300, 0.800 → 0.500; 0.05 allowed",)
    assert "team/stream@3 is not promoted: first fell by 0.300" in said(run)


def test_a_refusal_can_end_the_run(make_run: Callable[..., Run]) -> None:
    rows = ((0.8, 0.2, 0.1), (0.5, 0.7, 0.3), (0.8, 0.7, 0.9))
    ends = make_run(ScriptedScorer(rows), gates={"after_refusal": "stop"})()
    assert ends.stopped and len(ends.stages) == 2
    goes_on = make_run(ScriptedScorer(rows), "other", gates={"after_refusal": "go-on"}, name="team/other")()
    assert [stage.promoted for stage in goes_on.stages] == [True, False, True]


def test_text_drift_is_a_gate(make_run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("text")
    scorer = ScriptedScorer(GOOD, nats=(1.91, 1.95, 1.915))
    record = make_run(scorer, text="held.txt", gates={"max_text_drift": 0.02})()
    assert [stage.promoted for stage in record.stages] == [True, False, True]
    assert record.stages[1].refusals == ("held-out text costs 0.050 nats a token more than the base's; 0.02 allowed",)


def test_small_losses_do_not_add_up_unseen() -> None:
    rows = [(0.80, 0.1), (0.785, 0.9)]
    assert judge(Gates(max_drop=0.02), ("a", "b"), rows, [0]) == ()
    rows = [(0.80, 0.1, 0), (0.785, 0.9, 0), (0.77, 0.9, 0.5)]
    [fall] = judge(Gates(max_drop=0.02), ("a", "b", "c"), rows, [0, 1])
    assert (fall.task, fall.before, fall.now) == ("a", 0.80, 0.77)
    assert judge(Gates(max_drop=0.02), ("a", "b", "c"), rows, []) == ()  # nothing is served, nothing can fall


def test_somebody_elses_promotion_is_not_overwritten(
    make_run: Callable[..., Run], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(ScriptedScorer(GOOD))
    scores = run.scorer.scores

    def meddle(cells: Sequence[Cell]) -> list[dict[str, float]]:
        if len(run.scorer.cells) == 2:  # type: ignore[attr-defined]
            hub.tag("team/stream@1", "prod")  # somebody rolls back by hand before the third stage
        return scores(cells)

    monkeypatch.setattr(run.scorer, "scores", meddle)
    record = run()
    assert [stage.promoted for stage in record.stages] == [True, True, False]
    assert "somebody else moved the alias" in record.stages[2].refusals[0]
    assert hub.aliases("team/stream")["prod"].version == 1


class Stopped(Exception):
    """Somebody pulled the plug."""


POINTS = ("trained", "saved", "scored", "laid out", "pushed", "promoted", "recorded")


@pytest.mark.parametrize("point", POINTS)
def test_a_run_stopped_anywhere_goes_on_to_the_same_end(
    point: str, make_run: Callable[..., Run], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped right after `point` of the second stage, then begun again by the same command."""
    options = {"strategy": {"name": "on-policy-replay", "share": 0.2}, "gates": {"max_drop": 0.05}}
    whole = make_run(ScriptedScorer(FORGETS), "whole", name="team/whole", **options)()

    def once_after(owner: Any, name: str, when: Callable[[], bool]) -> None:
        original = getattr(owner, name)

        def replaced(*args: Any, **given: Any) -> Any:
            done = original(*args, **given)
            if when():
                monkeypatch.undo()
                raise Stopped
            return done

        monkeypatch.setattr(owner, name, replaced)

    run = make_run(ScriptedScorer(FORGETS), "cut", name="team/cut", **options)
    second = lambda: len(RunRecord.read(run.directory).stages) == 1  # noqa: E731
    owner, name = {
        "trained": (ScriptedTrainer, "fit"),
        "saved": (run_module._Stage, "_learn"),
        "scored": (run_module._Stage, "_scores"),
        "laid out": (run_module._Stage, "_adapter"),
        "pushed": (Hub, "push"),
        "promoted": (run_module, "promote"),
        "recorded": (RunRecord, "write"),
    }[point]
    once_after(owner, name, second if point != "recorded" else lambda: len(RunRecord.read(run.directory).stages) == 2)
    with pytest.raises(Stopped):
        run()
    (run.stage_directory(1) / ".outcome.rest").mkdir(parents=True, exist_ok=True)  # what a dying write leaves
    record = make_run(ScriptedScorer(FORGETS), "cut", name="team/cut", **options)()
    assert [replace(stage, version="", parent=None, digest="") for stage in record.stages] == [
        replace(stage, version="", parent=None, digest="") for stage in whole.stages
    ]
    for number in (1, 2, 3):
        cut, other = (hub.resolve(f"team/{name}@{number}").manifest for name in ("cut", "whole"))
        assert cut.tensors == other.tensors and cut.metrics == other.metrics
    assert len(hub.versions("team/cut")) == 3
    assert hub.aliases("team/cut")["prod"].version == hub.aliases("team/whole")["prod"].version == 2


def test_a_directory_belongs_to_one_plan_and_its_data(make_run: Callable[..., Run], tmp_path: Path) -> None:
    make_run(ScriptedScorer(GOOD))()
    with pytest.raises(RunMismatch, match=r"another plan \(other: gates\)"):
        make_run(ScriptedScorer(GOOD), gates={"max_drop": 0.5})()
    run = make_run(ScriptedScorer(GOOD))
    file = tmp_path / "second-eval.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines()[0] + "\n")
    with pytest.raises(RunMismatch, match="second/eval"):
        replace(run, data=prepare_data(run.plan, run.directory))()
    with pytest.raises(RunMissing):
        RunRecord.read(tmp_path)
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(RunMismatch):
        RunRecord.read(tmp_path)


def test_isolated_adapters_have_names_of_their_own(make_run: Callable[..., Run], hub: Hub) -> None:
    scorer = ScriptedScorer(GOOD)
    record = make_run(scorer, strategy="isolated")()
    assert [stage.version for stage in record.stages] == [f"team/stream-{label}@1" for label in THREE]
    assert all(stage.parent is None and stage.promoted for stage in record.stages)
    assert record.matrix.rows == ((0.8, 0.1, 0.1), (0.8, 0.7, 0.1), (0.8, 0.7, 0.9))
    assert [[exam for exam, adapter in cells if adapter] for cells in scorer.cells] == [[0], [1], [2]]


def embedded(groups: Sequence[Sequence[Example]]) -> Embedded:
    """Embeddings that say the task, but for the third's first evaluation question, which is like nothing before."""
    generator = torch.Generator().manual_seed(1)
    read = []
    for examples in groups:
        rows = torch.randn(len(examples), 6, generator=generator)
        for row, one in zip(rows, examples, strict=True):
            row[THREE.index(one.prompt[-1].content.split()[0])] += 30
        if len(examples) == 4 and "third" in examples[0].prompt[-1].content:
            rows[0] = 500.0
        read.append(rows)
    return Embedded(tuple(read), 1, "sha256:" + "1" * 64, "int8")


def test_answers_are_measured_with_each_tasks_own_adapter_and_the_last(make_run: Callable[..., Run]) -> None:
    class Asked(ScriptedScorer):
        def losses(self, adapters: Sequence[Path], examples: Sequence[Example]) -> list[list[float]]:
            asked.append([self.stage_of(adapter) for adapter in adapters])
            return [[float(self.stage_of(one)), float(self.stage_of(one)) + 1] * len(examples) for one in adapters]

    asked: list[list[int]] = []
    run = make_run(Asked(GOOD))
    record = run()
    assert asked == [[0, 2], [1, 2], [2]]
    told = {"own": [0.5, 1.5, 2.5], "last": [2.5, 2.5, 2.5]}
    assert answer_nats.read(run.directory, 3) == told and answer_nats.read(run.directory, 2) is None
    run()
    assert len(asked) == 3  # once
    page = as_markdown(summary(record, {}, {}, None, told))
    assert "| first | 0.500 | 2.500 | +2.000 |" in page
    apart = make_run(Asked(GOOD), "apart", name="team/apart", strategy="isolated")
    apart()
    assert asked[3:] == [[0], [1], [2]] and answer_nats.read(apart.directory, 3) == {**told, "last": told["own"]}


def test_questions_too_long_for_answer_nats_are_left_out_and_said(make_run: Callable[..., Run]) -> None:
    class Long(ScriptedScorer):
        def losses(self, adapters: Sequence[Path], examples: Sequence[Example]) -> list[list[float]]:
            return [[math.nan, *[2.0] * (len(examples) - 1)] for _ in adapters]

    run = make_run(Long(GOOD))
    run()
    assert answer_nats.read(run.directory, 3) == {"own": [2.0] * 3, "last": [2.0] * 3}
    assert "second: 1 questions are too long" in said(run)


def test_isolated_runs_fit_and_score_a_router(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(ScriptedScorer(GOOD), strategy="isolated")
    replace(run, embed=embedded)()
    told = write_report(run.directory, tmp_path / "out")["routed"]
    assert told["oracle"] == [0.8, 0.7, 0.9]
    assert told["names"] == [f"team/stream-{label}:prod" for label in THREE]
    assert told["to_base"][2] >= 0.25 and told["right"][2] <= 0.75
    assert all(right + base == 1 for right, base in zip(told["right"], told["to_base"], strict=True))  # none to another
    assert told["scores"] == told["right"]
    router = Router.read(run.directory / "router")
    assert (router.layer, router.base, router.quantization) == (1, "sha256:" + "1" * 64, "int8")
    assert router.names == tuple(told["names"])
    assert "| third | " in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("promoted", [2, 1])
def test_what_was_not_promoted_is_not_routed_to(
    make_run: Callable[..., Run], hub: Hub, tmp_path: Path, promoted: int
) -> None:
    """Where the text's drift refuses a stage, its prompts are the base's; one promoted adapter is no choice."""
    (tmp_path / "held.txt").write_text("x")
    nats = [1.9] * promoted + [3.0] * (3 - promoted)
    run = make_run(
        ScriptedScorer(GOOD, nats), strategy="isolated", text="held.txt", gates={"max_drop": 1, "max_text_drift": 0.1}
    )
    record = replace(run, embed=embedded)()
    assert [stage.promoted for stage in record.stages] == [index < promoted for index in range(3)]
    if promoted == 1:
        assert not (run.directory / "router").exists() and write_report(run.directory, tmp_path / "o")["routed"] is None
        return
    told = write_report(run.directory, tmp_path / "out")["routed"]
    assert told["names"] == ["team/stream-first:prod", "team/stream-second:prod", None]
    assert Router.read(run.directory / "router").names == tuple(told["names"][:2])
    assert told["right"][2] == told["to_base"][2] == 1.0 and told["scores"][2] == 0.0


def test_the_report_has_table_pictures_and_numbers(make_run: Callable[..., Run], tmp_path: Path) -> None:
    run = make_run(ScriptedScorer(FORGETS), intruders=True)
    run()
    make_run(ScriptedScorer(GOOD), "single", strategy="isolated", name="team/single")()
    told = write_report(run.directory, tmp_path / "out", single=tmp_path / "single")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "curves.png", "intruders.png", "matrix.png", "report.json", "report.md",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(told))
    assert told["acc"] == pytest.approx(0.7) and told["bwt"] == pytest.approx(-0.15)
    assert told["below"]["each task alone"] == pytest.approx(0.7 - 0.8)
    page = (tmp_path / "out" / "report.md").read_text()
    assert "| third | 0.500 | 0.700 | **0.900** |" in page and "no: first fell by 0.300" in page
    assert "| ACC | 0.700 |" in page and "| BWT | -0.150 |" in page
    assert "![matrix.png](matrix.png)" in page and "| worst task | first -0.300 |" in page
    assert told["stages"][0]["intruders"]["relative_norm"] > 0
    assert told["stages"][0]["adapter_bytes"] > 1000 and told["stages"][2]["seconds"] == 2.0


def test_a_bound_is_of_the_same_tasks_and_base(make_run: Callable[..., Run], tmp_path: Path) -> None:
    two = ("first", "second")
    run = make_run(ScriptedScorer(GOOD))
    record = run()
    bound = make_run(ScriptedScorer(FORGETS), "bound", strategy="joint", name="team/bound")
    joint = bound()
    places = run.directory, tmp_path / "out"
    told = write_report(*places, joint=bound.directory)["below"]["all tasks at once"]
    assert told == pytest.approx(sum(GOOD[2]) / 3 - 0.7)
    with pytest.raises(BoundMismatch, match="the strategy isolated, and the one given has joint"):
        write_report(*places, single=bound.directory)
    make_run(ScriptedScorer(FORGETS), "less", strategy="joint", name="team/less", labels=two)()
    with pytest.raises(BoundMismatch, match="has not learned third"):
        write_report(*places, joint=tmp_path / "less")
    # Half a run is held to what it has learned, by label whatever the order.
    replace(record, stages=record.stages[:1]).write(run.directory)
    turned = {**joint.plan, "tasks": list(reversed(joint.plan["tasks"]))}
    replace(joint, plan=turned).write(bound.directory)
    assert write_report(*places, joint=bound.directory)["below"]["all tasks at once"] == pytest.approx(0.8 - 0.9)
    replace(joint, data={**joint.data, "first/eval": "sha256:other"}).write(bound.directory)
    with pytest.raises(BoundMismatch, match="other data for first"):
        write_report(*places, joint=bound.directory)
    replace(joint, plan={**joint.plan, "base": "other"}).write(bound.directory)
    with pytest.raises(BoundMismatch, match="another base: other"):
        write_report(*places, joint=bound.directory)


def test_a_merge_may_serve_a_rank_at_which_nothing_could_train(write_plan: Callable[..., Path]) -> None:
    """Rank 16 and alpha 8 would make alpha 10.5 at the rank of the merge."""
    file = write_plan(strategy={"name": "merge", "rank_factor": 1.3}, set={"rank": 16, "alpha": 8})
    plan = ContinualPlan.read(file)
    assert (plan.served_rank, plan.recipe.rank, plan.recipe.alpha) == (21, 16, 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "best"}, "no strategy 'best'"),
        ({"gates": {"drop": 1}}, "unknown key 'drop'"),
        ({"set": {"rank": 0}}, "rank must lie"),
        ({"set": {"colour": 1}}, "unknown key 'colour'"),
        ({"name": "team/x@3"}, "name"),
        ({"tasks": []}, "at least one task"),
        ({"tasks": ["sentiment", "sentiment"]}, "there twice"),
        ({"tasks": ["colour"]}, "no task is called"),
        ({"tasks": [{"task": "sentiment", "train_file": "x"}]}, "both train_file and eval_file"),
        ({"gates": {"max_text_drift": 0.1}}, "needs a text"),
        ({"keep_text": "held.txt"}, "keep_text is read by the strategy aimed alone"),
        ({"seed": -1}, "from 0 up"),
        ({"set": {"init": "qera"}}, "set: init: each adapter would hold"),
        ({"quantize": "int2"}, "one of nf4"),
        ({"reduce_intruders": 2}, "from 0 to 1"),
        ({"strategy": None}, "strategy is missing"),
        ({"strategy": "o-lora", "set": {"rank": 600}}, "2 tasks at rank 600 make an adapter of rank 1200"),
        ({"strategy": {"name": "merge", "rank_factor": 1.3}, "set": {"rank": 1000}}, "and rank must lie between 1 and"),
        ({"strategy": "o-lora", "set": {"rank": 100, "alpha": 5000}}, "and alpha must lie between 1 and"),
        ({"gates": {"alias": "Prod Live!"}}, "gates: alias: 'Prod Live!'"),
        ({"gates": {"max_drop": None}}, "1 allows every fall"),
        ({"text": ""}, "text is the name of a file, not ''"),
        ({"text": False}, "text is the name of a file, not False"),
        ({"keep_text": False}, "keep_text is the name of a file, not False"),
        ({"checkpoint_steps": None}, "leave it out for 50"),
        ({"tasks": [{"task": "sentiment", "train": None}]}, "leave it out for 400"),
        ({"tasks": [{"label": "mine"}]}, "number 1: say which task it is"),
        ({"strategy": "isolated", "tasks": [{"task": "sentiment", "label": "größe"}]}, "makes no adapter's name"),
        ({"strategy": "isolated", "tasks": [{"task": "sentiment", "label": "x²"}]}, "makes no adapter's name"),
        ({"strategy": "isolated", "tasks": [{"task": "sentiment", "label": "a" * 70}]}, "makes no adapter's name"),
    ],
)
def test_plans_say_what_is_wrong_with_them(write_plan: Callable[..., Path], changes: dict[str, Any], said: str) -> None:
    from training.continual.errors import ContinualPlanInvalid

    with pytest.raises(ContinualPlanInvalid, match=said):
        ContinualPlan.read(write_plan(**changes))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("strategy", "where"),
    [({"name": "on-policy-replay", "share": 0.2}, ""), ({"name": "aimed", "reads": 4, "again": 1.0}, "again-1")],
    ids=["on-policy-replay", "aimed, b again"],
)
def test_kill_nine_in_the_middle_of_a_stage(
    strategy: dict[str, Any], where: str, write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    """The real verb, trainer, engine and hub: killed while the second stage trains, then given again."""
    plan = write_plan(strategy=strategy, gates={"max_drop": 1.0}, intruders=False)

    def command(name: str) -> list[str]:
        return ["continual", "run", str(plan), "--out", str(tmp_path / name), "--hub", str(tmp_path / f"{name}-hub"),
                "--threads", "1", "--json"]  # fmt: skip

    child = subprocess.Popen(
        [sys.executable, "-c", "from hub.cli import main; main()", *command("cut")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    checkpoints = tmp_path / "cut" / "stages" / "2-second" / where / "trained.checkpoints"
    try:
        while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
            assert child.poll() is None, child.stderr and child.stderr.read().decode()
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.communicate()
    assert len(RunRecord.read(tmp_path / "cut").stages) == 1 and checkpoints.is_dir()
    told = {}
    for name in ("cut", "whole"):
        result = CliRunner().invoke(group, command(name), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        told[name] = json.loads(result.stdout)
        assert len(RunRecord.read(tmp_path / name).stages) == 2
    assert told["cut"]["matrix"] == told["whole"]["matrix"] and told["cut"]["base"] == told["whole"]["base"]
    for number in (1, 2):
        cut, whole = ((Hub.open(str(tmp_path / f"{n}-hub"))) for n in ("cut", "whole"))
        with cut, whole:
            assert (
                cut.resolve(f"team/stream@{number}").manifest.tensors
                == whole.resolve(f"team/stream@{number}").manifest.tensors
            )
    page = CliRunner().invoke(group, ["continual", "report", str(tmp_path / "cut")], catch_exceptions=False).output
    assert "| second |" in page and (tmp_path / "cut" / "report" / "matrix.png").is_file()


@pytest.mark.timeout(240)
def test_the_verb_routes_isolated_adapters_and_measures_drift(write_plan: Callable[..., Path], tmp_path: Path) -> None:
    """Real trainer, engine, text loss, embeddings, intruders and pictures in one run."""
    (tmp_path / "held.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    plan = write_plan(strategy="isolated", text="held.txt", text_windows=2, max_steps=3, reduce_intruders=0.25)
    arguments = ["--out", str(tmp_path / "run"), "--hub", str(tmp_path / "hub"), "--threads", "1", "--json"]
    result = CliRunner().invoke(group, ["continual", "run", str(plan), *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["routed"]["names"] == ["team/stream-first:prod", "team/stream-second:prod"]
    assert len(told["answer_nats"]["own"]) == 2
    assert told["text_drift_nats"] is not None and told["stages"][0]["text_nats"] > 0
    assert told["stages"][1]["intruders"]["relative_norm"] > 0
    assert "intruders_reduced" in told["stages"][0]["notes"]
    assert (tmp_path / "run" / "router" / "router.safetensors").is_file()


def test_the_guides_plan_is_a_plan(tmp_path: Path) -> None:
    import yaml

    page = (Path(__file__).parents[3] / "docs" / "continual.md").read_text("utf-8")
    told = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    plan = ContinualPlan.parse(told, tmp_path)
    assert plan.labels == ("sentiment", "mine") and plan.options == {"share": 0.05, "capacity": 500}
    for name in KINDS:
        assert f"| `{name}` |" in page
