"""Watching a run: validation as it goes, stopping, warning, curves, and all of it the same after a resume."""

from __future__ import annotations

import io
import json
import re
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hub.base import BaseIdentity
from training.checkpoints import Checkpoints
from training.data import Example, Message, read_jsonl, write_jsonl
from training.errors import DataTooSmall, LogUnavailable, OutputExists, OutputUnwritable, RecipeInvalid, ResumeMismatch
from training.finetune import Plan, train
from training.hold_out import hold_out
from training.progress import ProgressLine
from training.recipe import Recipe
from training.skills import SkillData, mix_in
from training.watch import Watch

TINY = Recipe(
    name="tiny", source="these tests", when="never else", rank=4, alpha=8, learning_rate=2e-2, epochs=12.0, batch=4,
    accumulation=2, max_length=200, hold_out=0.2, dropout=0.1, seed=1, schedule="constant_with_warmup",
)  # fmt: skip

pytestmark = [
    pytest.mark.usefixtures("single_precision"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.timeout(180),
]


@pytest.fixture
def plan(tiny_base: Path, tmp_path: Path) -> Plan:
    """A run that learns sixteen examples by heart: what is held out gets worse soon."""
    file = tmp_path / "chat.jsonl"
    colours = ["red", "green", "blue", "teal"]
    write_jsonl(file, [Example.of(user=f"Number {n * 7919 % 1000}?", answer=colours[n * n % 7 % 4]) for n in range(20)])
    base = BaseIdentity("tiny-base", None, "sha256:" + "0" * 64)
    return Plan(file, base, tiny_base, TINY, tmp_path / "out", threads=1, checkpoint_steps=3, validation_steps=1)


def quiet() -> Console:
    return Console(file=io.StringIO())


class Stopped(Exception):
    """Somebody pulled the plug."""


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == steps:
            raise Stopped

    monkeypatch.setattr(ProgressLine, "on_step_end", on_step_end)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_stops_when_nothing_improves_and_keeps_the_best_weights(plan: Plan, tmp_path: Path) -> None:
    console = quiet()
    stopped = train(replace(plan, early_stop=3), console)
    told = stopped.facts.metrics
    losses = dict(stopped.curves.validation)
    assert told["stopped_early"] and told["steps"] < 24
    best = told["validation_best_step"]
    assert losses[best] == min(losses.values()) and told["steps"] == best + 3
    assert told["validation_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert told["validation_loss_before"] == losses[0] and "no lower validation loss" in console.file.getvalue()  # type: ignore[attr-defined]
    # The weights are those of a run that ended at its best step.
    short = train(replace(plan, out=tmp_path / "short", max_steps=best), quiet())
    assert same(stopped.out, short.out)
    assert not stopped.out.with_name("out.checkpoints").exists()


def test_looking_changes_nothing(plan: Plan, tmp_path: Path) -> None:
    seldom = train(replace(plan, validation_steps=1000, max_steps=5), quiet())
    often = train(replace(plan, out=tmp_path / "often", max_steps=5), quiet())
    assert seldom.losses == often.losses and same(seldom.out, often.out)
    assert [step for step, _ in seldom.curves.validation] == [0, 5]
    assert [step for step, _ in often.curves.validation] == [0, 1, 2, 3, 4, 5]
    # One point a step: the mean of its two forwards.
    assert [loss for _, loss in often.curves.training] == [sum(often.losses[i : i + 2]) / 2 for i in range(0, 10, 2)]


@pytest.mark.parametrize("stop", [4, 5, 7])
def test_a_resumed_run_stops_where_the_uninterrupted_one_does(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    plan = replace(plan, early_stop=3)
    whole = train(replace(plan, out=tmp_path / "whole"), quiet())
    assert whole.facts.metrics["steps"] > 4
    with monkeypatch.context() as patched:
        stop_after(min(stop, whole.facts.metrics["steps"]), patched)
        with pytest.raises(Stopped):
            train(plan, quiet())
    resumed = train(replace(plan, resume=True), quiet())
    assert resumed.curves == whole.curves and same(resumed.out, whole.out)
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    for name in ("steps", "stopped_early", "validation_best_step", "memorizing_from_step", "validation_loss"):
        assert resumed.facts.metrics[name] == whole.facts.metrics[name]


def test_a_run_killed_just_after_it_stopped_does_not_go_on(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import output

    plan = replace(plan, early_stop=3)
    whole = train(replace(plan, out=tmp_path / "whole"), quiet())
    with monkeypatch.context() as patched:
        patched.setattr(output, "save_adapter", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            train(plan, quiet())
    assert Checkpoints.beside(plan.out, {}).latest() is not None
    resumed = train(replace(plan, resume=True), quiet())
    assert resumed.losses == () and resumed.curves == whole.curves and same(resumed.out, whole.out)


def test_resuming_with_other_watching_is_another_run(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stop_after(4, patched)
        with pytest.raises(Stopped):
            train(replace(plan, early_stop=30), quiet())
    with pytest.raises(ResumeMismatch, match=r"early_stop \(30, not 2\)"):
        train(replace(plan, early_stop=2, resume=True), quiet())


def test_a_log_has_the_held_out_loss_beside_the_training_loss(plan: Plan) -> None:
    said = io.StringIO()
    done = train(replace(plan, max_steps=4, validation_steps=2), Console(file=said, width=400))
    lines = [line for line in said.getvalue().splitlines() if "step " in line]
    measured = dict(done.curves.validation)
    assert [f", held out {measured[step]:.3f}, " in line for step, line in zip((0, 2, 2, 4), lines, strict=True)] == [
        True
    ] * 4


@pytest.mark.parametrize(("columns", "speed"), [(80, False), (120, True)])
def test_a_bar_cuts_neither_steps_nor_losses(columns: int, speed: bool) -> None:
    said = io.StringIO()
    line = ProgressLine(Console(file=said, width=columns, force_terminal=True, color_system=None), "train tickets")
    line.watch(types.SimpleNamespace(losses=[1.234], tokens=100))  # type: ignore[arg-type]
    line.hear("validation/loss", 0, 1.5)
    line.on_train_begin(None, types.SimpleNamespace(global_step=0, max_steps=240), None)
    line.on_step_end(None, types.SimpleNamespace(global_step=24, max_steps=240), None)
    line.stop()
    last = [shown for shown in re.split(r"[\r\n]", said.getvalue()) if "train tickets" in shown][-1]
    assert "24/240" in last and "loss 1.234, held out 1.500" in last and "…" not in last
    assert ("tokens/s" in last) is speed


def watch_of(losses: list[float], training: float, patience: int, tmp_path: Path) -> tuple[Watch, io.StringIO]:
    """A watch that saw these validation losses, with this training loss throughout."""
    said, left = io.StringIO(), iter(losses)
    watch = Watch(Console(file=said, width=400), lambda: next(left), 1, patience, tmp_path / "best.safetensors")
    trainer = types.SimpleNamespace(losses=[], model=torch.nn.Linear(1, 1))
    watch.watch(trainer)  # type: ignore[arg-type]
    watch.begin()
    for step in range(1, len(losses)):
        trainer.losses.append(training)
        state, control = types.SimpleNamespace(global_step=step, max_steps=99), types.SimpleNamespace()
        watch.on_step_end(None, state, control)
    return watch, said


@pytest.mark.parametrize(
    ("losses", "training", "warns"),
    [
        ([2.0, 1.0, 0.9], 0.1, False),  # low, but what is held out improves: short labels do that
        ([2.0, 0.5, 0.6], 0.1, True),
        ([2.0, 0.5, 0.6], 0.3, False),  # rises, but nothing is known by heart yet
    ],
)
def test_a_low_training_loss_alone_is_no_overfitting(
    losses: list[float], training: float, warns: bool, tmp_path: Path
) -> None:
    watch, said = watch_of(losses, training, 0, tmp_path)
    assert (watch.warned_at == 2) is warns
    assert ("learn by heart" in said.getvalue()) is warns


def test_skill_examples_are_mixed_in_by_share(plan: Plan, tmp_path: Path) -> None:
    skills = [Example.of(user=f"Say {n}", answer=str(n)) for n in range(40)]
    own = [Example.of(user=f"q {n}", answer="a") for n in range(95)]
    mixed = mix_in(own, skills, 0.05, seed=3)
    assert mixed[:95] == tuple(own) and len(mixed) == 100 and all(example in skills for example in mixed[95:])
    assert len({example.prompt for example in mixed[95:]}) == 5
    assert mix_in(own, skills, 0.05, seed=3) == mixed != mix_in(own, skills, 0.05, seed=4)
    held = [skills[n] for n in range(36)]
    assert not {example.prompt for example in mix_in(own, skills, 0.04, 0, held)} & {e.prompt for e in held}
    with pytest.raises(DataTooSmall, match="takes 95 skill examples, and there are 40"):
        mix_in(own, skills, 0.5, 0)

    file = tmp_path / "skills.jsonl"
    digest = write_jsonl(file, skills)
    done = train(replace(plan, skills=SkillData(file, 0.2), max_steps=1), quiet())
    training, _ = hold_out(read_jsonl(plan.data).examples, 0.2, 1)
    assert done.facts.datasets["skills"] == {"file": "skills.jsonl", "digest": digest, "share": 0.2, "examples": 4}
    assert done.facts.datasets["train_examples"] == len(training) + 4


@pytest.mark.parametrize("own", [0, 37, 5000])
def test_the_share_advised_is_one_that_can_be_had(own: int) -> None:
    training = [Example.of(user=f"q {n}", answer="a") for n in range(own)]
    skills = [Example.of(user=f"s {n}", answer="a") for n in range(3)]
    if not own:
        with pytest.raises(DataTooSmall, match=r"there are 0: give more$"):
            mix_in([*training, skills[0]], [], 0.5, 0)
        return
    with pytest.raises(DataTooSmall, match="--skill-share") as refused:
        mix_in(training, skills, 0.5, 0)
    share = float(str(refused.value).rpartition(" ")[2])
    assert len(mix_in(training, skills, share, 0)) > own


def test_skills_that_ask_what_is_held_out_at_any_turn_are_not_drawn() -> None:
    held = Example.of(user="q", answer="a")
    chat = Example((*held.messages, Message("user", "Thanks."), Message("assistant", "Welcome.")))
    other = Example.of(user="s", answer="a")
    assert mix_in([other], [chat, other], 0.5, 0, [held])[1:] == (other,)


def test_other_skill_data_is_another_run(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "skills.jsonl"
    write_jsonl(file, [Example.of(user=f"Say {n}", answer=str(n)) for n in range(40)])
    plan = replace(plan, skills=SkillData(file, 0.2))
    with monkeypatch.context() as patched:
        stop_after(4, patched)
        with pytest.raises(Stopped):
            train(plan, quiet())
    write_jsonl(file, [Example.of(user=f"Say {n}!", answer=str(n)) for n in range(40)])
    with pytest.raises(ResumeMismatch, match="skills"):
        train(replace(plan, resume=True), quiet())


@pytest.mark.parametrize(("patience", "every", "said"), [(3, 8, True), (3, 7, False), (1, 24, True), (0, 24, False)])
def test_a_patience_that_cannot_run_out_is_said(patience: int, every: int, said: bool, tmp_path: Path) -> None:
    console = quiet()
    watch = Watch(console, lambda: 1.0, every, patience, tmp_path / "best")
    watch.on_train_begin(None, types.SimpleNamespace(max_steps=24), None)
    words = f"a validation loss every {every} of 24 steps the run only keeps its best weights"
    assert (words in " ".join(console.file.getvalue().split())) == said  # type: ignore[attr-defined]


def test_without_validation_there_is_no_early_stop(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(RecipeInvalid, match="held-out"):
        train(replace(plan, recipe=plan.recipe.but(hold_out=0.0), early_stop=2), quiet())
    watch = Watch(quiet(), lambda: None, 1, 2, tmp_path / "best")
    watch.watch(types.SimpleNamespace(losses=[], model=None))  # type: ignore[arg-type]
    watch.load_best()


def test_curves_and_events_are_not_written_into_the_directory_to_come(plan: Plan) -> None:
    for changes in ({"curves": (plan.out / "c.json",)}, {"tensorboard": plan.out / "log"}, {"tensorboard": plan.out}):
        with pytest.raises(OutputExists, match="lies in"):
            train(replace(plan, **changes), quiet())  # type: ignore[arg-type]
        assert not plan.out.exists()


def test_curves_are_drawn_and_written(plan: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = tuple(tmp_path / "curves" / name for name in ("c.png", "c.svg", "c.json"))
    done = train(replace(plan, max_steps=4, curves=files), quiet())
    png, svg, numbers = (file.read_bytes() for file in files)
    assert png.startswith(b"\x89PNG") and b"<svg" in svg and b"held out" in svg
    told = json.loads(numbers)
    assert [tuple(point) for point in told["training"]] == list(done.curves.training)
    assert [tuple(point) for point in told["validation"]] == list(done.curves.validation)
    again = train(replace(plan, out=tmp_path / "again", max_steps=4, curves=(tmp_path / "d.svg",)), quiet())
    assert (tmp_path / "d.svg").read_bytes() == svg.replace(
        b"out: lora", b"again: lora"
    ) and again.curves == done.curves


def test_what_cannot_be_drawn_is_refused_before_training(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LogUnavailable, match=r"c\.gif"):
        train(replace(plan, curves=(tmp_path / "c.gif",), base_directory=tmp_path / "none"), quiet())
    (tmp_path / "file").touch()
    (tmp_path / "directory.json").mkdir()
    for name in ("file/c.json", "file/below/c.json", "directory.json"):
        with pytest.raises(OutputUnwritable, match="cannot write"):
            train(replace(plan, curves=(tmp_path / name,), base_directory=tmp_path / "none"), quiet())
    import builtins

    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(LogUnavailable, match="pip install"):
        train(replace(plan, curves=(tmp_path / "c.png",), base_directory=tmp_path / "none"), quiet())


def test_tensorboard_has_what_was_measured_also_after_a_resume(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plan = replace(plan, tensorboard=tmp_path / "events", max_steps=6)
    with monkeypatch.context() as patched:
        stop_after(5, patched)
        with pytest.raises(Stopped):
            train(plan, quiet())
    done = train(replace(plan, resume=True), quiet())
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for tag, curve in (("train/loss", done.curves.training), ("validation/loss", done.curves.validation)):
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in curve]
        assert [value for _, value in found] == pytest.approx([loss for _, loss in curve], rel=1e-6)
