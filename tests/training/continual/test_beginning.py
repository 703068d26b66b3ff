"""How runs begin and go on: tasks appended, aliases in use, what changed, and what is known to fail before training."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from hub.cli import group
from hub.hub import Hub
from server.config import MIB
from server.errors import RouterInvalid
from tests.training.continual.scripted import GOOD, MODULES, ScriptedScorer, ScriptedTrainer
from tests.training.continual.test_run import Stopped, embedded, said
from training.base_weights import matrices
from training.continual import beginning, ending, scoring
from training.continual import run as run_module
from training.continual.errors import AliasTaken, RunMismatch
from training.continual.factors import Pair, joined, read_factors, write_factors
from training.continual.making import make_run as make_real
from training.continual.plan import ContinualPlan
from training.continual.record import RunRecord, StageRecord
from training.continual.registry import KINDS
from training.continual.run import Run
from training.continual.scoring import Cell, EngineScorer, Exam
from training.continual.stage import Trained
from training.data import Example, write_jsonl
from training.errors import DataInvalid, DataTooSmall, GenerationFailed
from training.lock import held
from training.tasks import task_named

TWO = ("first", "second")


class Going(ScriptedTrainer):
    """Goes on from where a lesson begins, as a trainer does."""

    def fit(self, lesson: Any, directory: Path, console: Console) -> Trained:
        done = super().fit(lesson, directory, console)
        if lesson.start is None:
            return done
        if lesson.grow:
            return replace(done, factors=joined(lesson.start, done.factors))
        return replace(done, factors={m: Pair(p.a + 0.1, p.b * 0.9) for m, p in lesson.start.items()})


def going(run: Run) -> Run:
    trainer: Any = Going(run.trainer.base_directory)
    return replace(run, trainer=trainer, embed=embedded if run.plan.strategy == "isolated" else None)


def bare(record: RunRecord) -> list[StageRecord]:
    """The stages without what tells one run's versions from another's."""
    return [replace(stage, version="", digest="", parent=None, adapter_bytes=0) for stage in record.stages]


@pytest.mark.parametrize("strategy", KINDS)
@pytest.mark.parametrize("cut", [False, True], ids=["finished", "in the second stage"])
def test_appended_tasks_end_as_if_they_had_been_there_from_the_start(
    strategy: str, cut: bool, make_run: Callable[..., Run], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = going(make_run(ScriptedScorer(GOOD), "whole", name="team/whole", strategy=strategy))
    wanted = whole()
    first = going(make_run(ScriptedScorer(GOOD), "some", name="team/some", strategy=strategy, labels=TWO))
    if cut:
        with monkeypatch.context() as patched, pytest.raises(Stopped):
            patched.setattr(run_module._Stage, "_publish", stop_at_second(run_module._Stage._publish))
            first()
        assert len(RunRecord.read(first.directory).stages) == 1
    else:
        first()
    again = going(make_run(ScriptedScorer(GOOD), "some", name="team/some", strategy=strategy))
    record = again()
    assert bare(record) == bare(wanted)
    assert (record.base_row, record.matrix, record.data) == (wanted.base_row, wanted.matrix, wanted.data)
    for index in range(3):
        one, other = (read_factors(run.stage_directory(index) / "adapter") for run in (again, whole))
        assert all(torch.equal(one[m].a, other[m].a) and torch.equal(one[m].b, other[m].b) for m in other)
    assert ending.read_routed(again.directory) == without_names(ending.read_routed(whole.directory))
    names = ["team/some"] if strategy != "isolated" else [f"team/some-{label}" for label in record.labels]
    assert sum(len(hub.versions(name)) for name in names) == 3
    assert going(make_run(ScriptedScorer(()), "some", name="team/some", strategy=strategy))() == record


def stop_at_second(original: Callable[..., RunRecord]) -> Callable[..., RunRecord]:
    def publish(stage: Any, *given: Any) -> RunRecord:
        if stage.index == 1:
            raise Stopped
        return original(stage, *given)

    return publish


def without_names(routed: dict[str, Any] | None) -> dict[str, Any] | None:
    if routed is None:
        return None
    return {**routed, "names": [name.replace("team/whole", "team/some") for name in routed["names"]]}


def test_tasks_can_be_appended_and_nothing_else_changed(make_run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("The quick brown fox jumps.")
    told = {"strategy": "aimed", "keep_text": "keep.txt"}
    going(make_run(ScriptedScorer(GOOD), labels=TWO, **told))()
    with pytest.raises(RunMismatch, match=r"\(other: tasks\); tasks can be appended"):
        make_run(ScriptedScorer(GOOD), labels=("second", "first", "third"), **told)()
    with pytest.raises(RunMismatch, match=r"\(other: tasks\)"):
        make_run(ScriptedScorer(GOOD), labels=("first",), **told)()
    with pytest.raises(RunMismatch, match=r"\(other: keep_text, tasks\)$"):
        make_run(ScriptedScorer(GOOD), strategy="aimed")()


def test_a_run_that_a_refusal_ended_says_so(make_run: Callable[..., Run]) -> None:
    rows = ((0.8, 0.2, 0.1), (0.5, 0.7, 0.3))
    make_run(ScriptedScorer(rows), gates={"after_refusal": "stop"}, labels=TWO)()
    run = make_run(ScriptedScorer(rows), gates={"after_refusal": "stop"})
    assert len(run().stages) == 2
    assert "team/stream@2 was refused, and the plan ends there" in said(run)


def test_a_new_run_does_not_take_an_alias_in_use(make_run: Callable[..., Run], hub: Hub) -> None:
    make_run(ScriptedScorer(GOOD))()
    other = make_run(ScriptedScorer(GOOD), "other")
    with pytest.raises(AliasTaken, match="team/stream:prod is team/stream@3 already") as refused:
        other()
    assert "tasks appended" in str(refused.value) and "another name" in str(refused.value)
    assert not other.trainer.lessons  # type: ignore[attr-defined]
    assert not (other.directory / "state.json").exists()
    make_run(ScriptedScorer(GOOD), "other", gates={"alias": "tried"})()
    assert {name: state.version for name, state in hub.aliases("team/stream").items()}["prod"] == 3
    make_run(ScriptedScorer(GOOD), "apart", strategy="isolated", labels=TWO)()
    hub.push(other.directory.parent / "run/stages/1-first/adapter", "team/stream-third:prod", base=other.plan.base)
    with pytest.raises(AliasTaken, match="team/stream-third:prod"):
        make_run(ScriptedScorer(GOOD), "apart", strategy="isolated")()


def test_an_alias_set_during_the_first_stage_is_left_alone(
    make_run: Callable[..., Run], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(ScriptedScorer(GOOD), labels=("first",))
    push = hub.push

    def meddle(*given: Any, **options: Any) -> Any:
        done = push(*given, **options)
        push(given[0].parent / "outcome" / "served", "team/stream:prod", base=run.plan.base)
        return done

    monkeypatch.setattr(hub, "push", meddle)
    record = run()
    assert "somebody else moved the alias" in record.stages[0].refusals[0]
    assert hub.aliases("team/stream")["prod"].version == 2


def test_a_text_or_base_that_changed_is_refused_where_it_was_recorded(
    make_run: Callable[..., Run], tmp_path: Path
) -> None:
    text = tmp_path / "held.txt"
    text.write_text("text")

    def run(fingerprint: str | None = None) -> Run:
        made = make_run(ScriptedScorer(GOOD), text="held.txt")
        made.trainer.base = replace(made.trainer.base, fingerprint=fingerprint)  # type: ignore[misc]
        return made

    record = run("sha256:1")()
    text.write_text("another text")
    with pytest.raises(RunMismatch, match=r"changed since this run began: text$"):
        run("sha256:1")()
    with pytest.raises(RunMismatch, match=r"changed since this run began: base, text$"):
        run("sha256:2")()
    early = {name: digest for name, digest in record.data.items() if "/" in name}  # as runs were recorded before
    replace(record, data=early).write(run().directory)
    assert run("sha256:1")().data["text"] != record.data["text"]
    text.write_text("text")
    with pytest.raises(RunMismatch, match="text"):
        run("sha256:1")()


def test_answers_that_a_task_cannot_score_are_known_before_training(
    make_run: Callable[..., Run], write_plan: Callable[..., Path], tmp_path: Path
) -> None:
    tasks = [{"task": "own-json", "label": "mine", "train_file": "first-train.jsonl", "eval_file": "first-eval.jsonl"}]
    run = make_run(ScriptedScorer(GOOD), tasks=tasks)
    with pytest.raises(DataInvalid, match="mine, evaluation: the answer of example 1 is no JSON object"):
        run()
    write_jsonl(tmp_path / "odd.jsonl", [Example.of(user="x", answer="y")])
    odd = [{"task": "iam-policy", "label": "odd", "train_file": "first-train.jsonl", "eval_file": "odd.jsonl"}]
    with pytest.raises(DataInvalid, match="odd, evaluation: the answer of example 1 is no JSON object"):
        make_run(ScriptedScorer(GOOD), tasks=odd)()
    assert not run.trainer.lessons and not (run.directory / "state.json").exists()  # type: ignore[attr-defined]


def test_a_question_too_long_for_the_base_is_known_before_training(
    write_plan: Callable[..., Path], tmp_path: Path, hub: Hub
) -> None:
    plan = ContinualPlan.read(write_plan())
    write_jsonl(tmp_path / "second-eval.jsonl", [Example.of(user="x" * n, answer="mixed") for n in (5, 600)])
    run = make_real(plan, tmp_path / "run", hub, 1, Console())
    with pytest.raises(GenerationFailed, match=r"^second, example 2: a prompt of 6\d\d tokens.* context of 512"):
        run()
    assert not (run.directory / "state.json").exists() and not (run.directory / "stages").exists()


def few(tmp_path: Path, make_run: Callable[..., Run]) -> Run:
    write_jsonl(tmp_path / "ten.jsonl", [Example.of(user=f"second {n}", answer="mixed") for n in range(10)])
    tasks = [
        {"task": "sentiment", "label": label, "train_file": train, "eval_file": f"{label}-eval.jsonl"}
        for label, train in (("first", "first-train.jsonl"), ("second", "ten.jsonl"))
    ]
    return replace(make_run(ScriptedScorer(GOOD), strategy="isolated", tasks=tasks), embed=embedded)


def test_a_task_too_small_for_the_router_is_known_before_training(make_run: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(DataTooSmall, match="second: fewer than 12 training examples"):
        few(tmp_path, make_run)()


def test_a_run_for_which_no_router_can_be_fitted_ends_all_the_same(
    make_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that began before the size was looked at."""
    run = few(tmp_path, make_run)
    monkeypatch.setattr(beginning, "LEAST_PROMPTS", 1)
    assert len(run().stages) == 2
    assert "there is no router: team/stream-second:prod has fewer than 12 prompts" in said(run)
    assert ending.read_routed(run.directory) is None
    assert RouterInvalid.reason == "ROUTER_INVALID"


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (None, DataInvalid, "text: cannot read held.txt: No such file"),
        ("", DataTooSmall, "text: held.txt: the text has fewer than two tokens"),
    ],
)
def test_a_text_that_cannot_be_measured_is_known_before_training(
    content: str | None, kind: type[Exception], said: str, write_plan: Callable[..., Path], tmp_path: Path, hub: Hub
) -> None:
    plan = ContinualPlan.read(write_plan(text="held.txt"))
    if content is not None:
        (tmp_path / "held.txt").write_text(content)
    with pytest.raises(kind, match=said):
        make_real(plan, tmp_path / "run", hub, 1, Console())


def test_two_processes_cannot_run_in_one_directory(write_plan: Callable[..., Path], tmp_path: Path) -> None:
    command = ["continual", "run", str(write_plan()), "--out", str(tmp_path / "run"), "--hub", str(tmp_path / "hub")]
    with held(tmp_path / "run", AssertionError()):
        result = CliRunner().invoke(group, command)
    assert getattr(result.exception, "reason", None) == "CONTINUAL_RUN_TAKEN"
    with held(tmp_path / "run", AssertionError()):
        pass  # let go of
    assert not (tmp_path / "run").exists()  # nothing came into it


def test_a_lock_that_its_holder_removed_meanwhile_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = held(tmp_path / "run", AssertionError())
    first.__enter__()
    real, opened = fcntl.flock, []

    def flock(file: IO[str], how: int) -> None:
        if not opened:
            first.__exit__(None, None, None)  # the first lets go between the second's opening and locking
        opened.append(file)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with held(tmp_path / "run", AssertionError()):
        assert len(opened) == 2 and (tmp_path / "run" / "lock").exists()
        with pytest.raises(KeyError), held(tmp_path / "run", KeyError()):
            pass


def test_a_growing_adapter_says_what_a_server_takes(make_run: Callable[..., Run]) -> None:
    told = {"rank": 100, "alpha": 100}
    run = make_run(ScriptedScorer(GOOD), strategy="o-lora", set=told)
    assert run.plan.served_rank == 300
    run()
    assert "from stage 3 on the adapter's rank passes 256, the most that `hub serve` takes" in said(run)
    flat = make_run(ScriptedScorer(GOOD), "flat", name="team/flat", set=told)
    flat()
    assert flat.plan.served_rank == 100 and "hub serve" not in said(flat)


@pytest.mark.timeout(120)
def test_an_adapter_beyond_what_a_server_takes_is_scored(tiny_base: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = {
        module: Pair(torch.randn(300, w.shape[1], generator=generator), torch.zeros(len(w), 300))
        for module, w in matrices(tiny_base, MODULES)
    }
    place = tmp_path / "adapter"
    place.mkdir()
    write_factors(place, factors, "tiny")
    exam = Exam("first", task_named("sentiment"), (Example.of(user="Is it good?", answer="positive"),))
    scorer = EngineScorer(str(tiny_base), tiny_base, (exam,), threads=1, served_rank=300)
    cells: Sequence[Cell] = [(0, None), (0, place)]
    base, own = scorer.scores(cells)
    assert base == own  # b is nothing


def test_the_engine_has_room_for_the_largest_adapter() -> None:
    matrix = SimpleNamespace(out_features=300_000, in_features=200_000)
    base: Any = SimpleNamespace(linears=lambda: {"one": matrix}, dtype=torch.bfloat16)
    usual, more = scoring._limits(base, 256), scoring._limits(base, 1000)
    assert (usual.max_adapter_rank, usual.adapter_memory_bytes) == (256, 512 * MIB)
    assert (more.max_adapter_rank, more.adapter_memory_bytes) == (1000, 1000 * 2 * 500_000)
