"""Whole runs on a tiny random Llama in float32: what comes out, and that a resumed run is the run it was."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hub.adapter_dir import parse_adapter
from hub.base import BaseIdentity
from training import finetune, output, trainable
from training.checkpoints import Checkpoints
from training.data import Example, read_jsonl, write_jsonl
from training.errors import (
    DataInvalid,
    DataTooSmall,
    MethodUnsupported,
    OutputExists,
    OutputTaken,
    ResumeMismatch,
    TrainingDiverged,
)
from training.finetune import Outcome, Plan, optimizer_of, train
from training.hold_out import hold_out
from training.loss import LabelLoss
from training.recipe import Recipe

TINY = Recipe(
    name="tiny", source="these tests", when="never else", rank=4, alpha=8, learning_rate=5e-3, epochs=3.0, batch=4,
    accumulation=2, max_length=200, hold_out=0.2, dropout=0.1, seed=1,
)  # fmt: skip

# The optimizer state is pickled by transformers and read back with weights_only.
pytestmark = [
    pytest.mark.usefixtures("single_precision"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def plan(tiny_base: Path, chat_file: Path, tmp_path: Path) -> Plan:
    base = BaseIdentity("tiny-base", None, "sha256:" + "0" * 64)
    return Plan(chat_file, base, tiny_base, TINY, tmp_path / "out", threads=1, checkpoint_steps=2)


def quiet() -> Console:
    return Console(file=io.StringIO())


class Stopped(Exception):
    """Somebody pulled the plug."""


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from training.progress import ProgressLine

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == steps:
            raise Stopped

    monkeypatch.setattr(ProgressLine, "on_step_end", on_step_end)


def test_a_run_writes_an_adapter_that_the_hub_takes(plan: Plan, tiny_base: Path) -> None:
    outcome = train(plan, quiet())
    assert sorted(path.name for path in plan.out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loraplex.json",
    ]
    parsed = parse_adapter(plan.out)
    assert set(parsed.ranks.values()) == {4} and len(parsed.ranks) == 14  # seven linears in each of two layers
    assert not parsed.changes_nothing
    config = json.loads((plan.out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-base"
    assert config["r"] == 4 and config["lora_alpha"] == 8
    facts = parsed.facts
    assert facts.base == BaseIdentity("tiny-base", None, "sha256:" + "0" * 64, "none")
    assert facts.recipe["name"] == "tiny" and facts.recipe["method"] == "lora"
    assert facts.recipe["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts.datasets["train_examples"] == 16 and facts.datasets["validation_examples"] == 4
    assert facts.metrics["validation_loss"] < facts.metrics["validation_loss_before"]
    assert facts.metrics["steps"] == 6 and len(outcome.losses) == 12
    assert not plan.out.with_name("out.checkpoints").exists()
    assert "tiny-base" in (plan.out / "README.md").read_text()


def test_provenance_is_recorded_only_for_the_file_it_was_written_for(plan: Plan, tmp_path: Path) -> None:
    card = {
        "task": "colours",
        "provenance": "made up",
        "licence": "none",
        "files": {"chat.jsonl": {"digest": read_jsonl(plan.data).digest}},
    }
    (plan.data.parent / "dataset.json").write_text(json.dumps(card))
    told = train(replace(plan, max_steps=1), quiet())
    assert told.facts.datasets["provenance"] == "made up"
    assert "colours" in (told.out / "README.md").read_text()
    for number, other in enumerate(("[]", "{", '{"files": []}', '{"files": {"chat.jsonl": 3}}', "\\ud83d")):
        (plan.data.parent / "dataset.json").write_text(other)
        unknown = train(replace(plan, max_steps=1, out=tmp_path / f"other{number}"), quiet())
        assert "provenance" not in unknown.facts.datasets
    (plan.data.parent / "dataset.json").write_text(json.dumps(card))
    plan.data.write_text(plan.data.read_text().replace("red", "rose"))
    changed = train(replace(plan, max_steps=1, out=tmp_path / "changed"), quiet())
    assert "provenance" not in changed.facts.datasets


def test_a_run_that_is_refused_leaves_nothing_behind(plan: Plan) -> None:
    """Long examples held out, so that there would be no validation loss; and none short enough at all."""
    examples = [*read_jsonl(plan.data).examples[:15]]
    place = next(n for n in range(1000) if hold_out((*examples, _long(n)), 0.05, 1)[1] == (_long(n),))
    write_jsonl(plan.data, [*examples, _long(place)])
    few = replace(plan, recipe=plan.recipe.but(hold_out=0.05))
    with pytest.raises(DataTooSmall, match="no validation loss, for none of the 1 examples held out has 200 tokens"):
        train(few, quiet())
    with pytest.raises(DataTooSmall, match="none of the 15 examples has 8 tokens"):
        train(replace(few, recipe=few.recipe.but(max_length=8)), quiet())
    assert not plan.out.with_name("out.checkpoints").exists()


def _long(number: int) -> Example:
    return Example.of(user="w " * 300 + str(number), answer="red")


def test_equal_plans_make_equal_weights(plan: Plan, tmp_path: Path) -> None:
    first = train(plan, quiet())
    torch.rand(3)
    second = train(replace(plan, out=tmp_path / "again"), quiet())
    assert first.losses == second.losses
    for name, tensor in load_file(first.out / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(second.out / "adapter_model.safetensors")[name])


@pytest.mark.parametrize("stop", [3, 4])  # within an epoch of two steps, and at the end of one
def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = train(replace(plan, out=tmp_path / "whole"), quiet())
    with monkeypatch.context() as patched:
        stop_after(stop, patched)
        with pytest.raises(Stopped):
            train(plan, quiet())
    assert not plan.out.exists()
    done = Checkpoints.beside(plan.out, {}).latest()
    assert done is not None
    steps_done = int(done.name.rpartition("-")[2])
    resumed = train(replace(plan, resume=True), quiet())
    assert resumed.losses == whole.losses[steps_done * TINY.accumulation :]
    for name, tensor in load_file(whole.out / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(resumed.out / "adapter_model.safetensors")[name])


def test_checkpoints_are_not_overwritten_and_not_resumed_by_another_run(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResumeMismatch, match="no checkpoint"):
        train(replace(plan, resume=True), quiet())
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(Stopped):
            train(plan, quiet())
    with pytest.raises(OutputExists, match="--resume"):
        train(plan, quiet())
    with pytest.raises(ResumeMismatch, match=r"recipe \(learning_rate \S+, not 0.0001\); resume with"):
        train(replace(plan, resume=True, recipe=TINY.but(learning_rate=1e-4)), quiet())
    plan.data.write_text(plan.data.read_text().replace("red", "mauve"))
    with pytest.raises(ResumeMismatch, match="other: data; resume with"):
        train(replace(plan, resume=True), quiet())


def test_two_processes_cannot_train_into_one_output(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def beside(*_: Any, **__: Any) -> None:  # while the first run is at its first step
        if not refused:
            with pytest.raises(OutputTaken, match=r"another process is training into \S+out: wait"):
                train(plan, quiet())
            refused.append(plan.out)
            assert (tmp_path / "out.checkpoints" / "run.json").is_file()

    from training.progress import ProgressLine

    monkeypatch.setattr(ProgressLine, "on_step_end", beside)
    train(replace(plan, max_steps=2), quiet())
    assert refused and plan.out.is_dir() and not (tmp_path / "out.checkpoints").exists()


def test_an_output_that_another_process_wrote_meanwhile_is_kept(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Checkpoints.alone

    def at_last(self: Checkpoints) -> AbstractContextManager[None]:
        plan.out.mkdir()
        (plan.out / "adapter_config.json").write_text("{}")
        return alone(self)

    monkeypatch.setattr(Checkpoints, "alone", at_last)
    with pytest.raises(OutputExists):
        train(plan, quiet())
    assert not plan.out.with_name("out.checkpoints").exists()


def test_nothing_is_written_over(plan: Plan) -> None:
    plan.out.mkdir()
    (plan.out / "mine.txt").write_text("keep")
    with pytest.raises(OutputExists):
        train(plan, quiet())
    assert (plan.out / "mine.txt").read_text() == "keep"


WRITTEN = ["README.md", "adapter_config.json", "adapter_model.safetensors", "loraplex.json"]


def test_a_link_to_an_empty_directory_is_written_through(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    plan.out.symlink_to("real")
    train(replace(plan, max_steps=1), quiet())
    assert plan.out.is_symlink()
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == WRITTEN


def test_an_empty_directory_whose_place_cannot_be_taken_is_filled(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a mounted volume is, see the next test."""
    plan.out.mkdir()
    number, rename = plan.out.stat().st_ino, Path.rename

    def refused(path: Path, target: Path) -> Path:
        if target == plan.out:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    train(replace(plan, max_steps=1), quiet())
    assert sorted(path.name for path in plan.out.iterdir()) == WRITTEN and plan.out.stat().st_ino == number
    assert not [path for path in plan.out.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("arguments", [["-t", "tmpfs", "none"], ["--bind", "empty"]])
def test_a_mounted_volume_is_filled(tmp_path: Path, arguments: list[str]) -> None:
    out = tmp_path / "volume"
    for name in ("volume", "empty"):
        (tmp_path / name).mkdir()
    if os.geteuid() or subprocess.run(["mount", *arguments, out], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("only root can mount, and not everywhere")
    try:
        output.check_free(out)
        output.write_directory(out, lambda directory: (directory / "config.json").touch())
        assert [path.name for path in out.iterdir()] == ["config.json"]
        with pytest.raises(OutputExists):
            output.check_free(out)
    finally:
        subprocess.run(["umount", out], check=True)


def test_the_directory_that_the_user_is_in_is_filled(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--out .` had no name to put checkpoints beside."""
    plan.out.mkdir()
    monkeypatch.chdir(plan.out)
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(Stopped):
            train(replace(plan, out=Path()), quiet())
    assert plan.out.with_name("out.checkpoints").is_dir()
    train(replace(plan, out=Path(), resume=True), quiet())
    assert sorted(path.name for path in Path().iterdir()) == WRITTEN
    assert not plan.out.with_name("out.checkpoints").exists()


def test_the_hold_out_is_taken_before_anything_looks_at_the_examples(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = finetune.encode_all

    def spy(tokenizer: Any, template: Any, examples: Any, *rest: Any) -> Any:
        seen.append({example.prompt for example in examples})
        return real(tokenizer, template, examples, *rest)

    monkeypatch.setattr(finetune, "encode_all", spy)
    train(replace(plan, max_steps=1), quiet())
    training, validation = seen
    assert training and validation and not training & validation


def test_every_weight_can_be_trained_and_comes_out_as_a_model(plan: Plan, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(replace(plan, method="full", recipe=TINY.but(learning_rate=1e-3)), quiet())
    trained = AutoModelForCausalLM.from_pretrained(plan.out)
    before = AutoModelForCausalLM.from_pretrained(tiny_base)
    changed = [
        name
        for (name, a), b in zip(trained.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(a, b)
    ]
    assert len(changed) == len(list(before.parameters()))
    assert AutoTokenizer.from_pretrained(plan.out).chat_template


def test_an_adapter_trains_on_the_nf4_base(plan: Plan, tmp_path: Path) -> None:
    plain = train(replace(plan, out=tmp_path / "plain", max_steps=1), quiet())
    plain_parameters = plain.facts.metrics["all_parameters"]  # two of NF4's lie in one byte
    outcome = train(replace(plan, method="qlora"), quiet())
    assert outcome.facts.base is not None and outcome.facts.base.quantization == "nf4"
    assert outcome.facts.metrics["validation_loss"] < outcome.facts.metrics["validation_loss_before"]
    assert outcome.facts.metrics["all_parameters"] == plain_parameters
    assert outcome.facts.metrics["optimizer"] == "adamw_torch_fused"  # a paged one is for GPUs
    weights = load_file(plan.out / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    moved = [name for name, tensor in weights.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(moved) == 14  # a weight repacked by an evaluation would leave the layers below without gradients


def test_the_optimizer_of_qlora_is_paged_on_a_gpu() -> None:
    from transformers import Trainer, TrainingArguments

    chosen = {
        (method, device): optimizer_of(method, device)
        for method in trainable.METHODS
        for device in ("cpu", "cuda", "cuda:1")
    }
    paged = {key for key, name in chosen.items() if name.startswith("paged")}
    assert paged == {("qlora", "cuda"), ("qlora", "cuda:1")}
    found = {}
    for name in set(chosen.values()):
        made, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(optim=name, use_cpu=True))
        found[made.__module__.partition(".")[0]] = options
    assert found["bitsandbytes"]["is_paged"] and found["bitsandbytes"]["optim_bits"] == 32
    assert found.keys() == {"bitsandbytes", "torch"}


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_precision_asked_for_is_used_whatever_is_fast(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    def run(out: str, precision: str) -> Outcome:
        asked = replace(TINY, precision=precision, method=method)
        return train(replace(plan, recipe=asked, method=method, out=tmp_path / out, max_steps=2), quiet())

    exact, rounded = run("float32", "float32"), run("bfloat16", "bfloat16")
    assert run("slow", "auto").losses == exact.losses
    monkeypatch.setattr(trainable, "bfloat16_is_fast", lambda device: True)
    assert run("fast", "auto").losses == rounded.losses != exact.losses
    assert run("fast-float32", "float32").losses == exact.losses
    assert rounded.losses == pytest.approx(exact.losses, rel=0.03)
    assert [one.facts.metrics["precision"] for one in (exact, rounded)] == ["float32", "bfloat16"]
    assert rounded.facts.recipe["precision"] == "bfloat16"


def test_modules_that_are_not_there_are_refused(plan: Plan) -> None:
    with pytest.raises(MethodUnsupported, match="c_attn"):
        train(replace(plan, recipe=TINY.but(targets=("c_attn",))), quiet())


def test_a_loss_that_is_no_number_ends_the_run(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import trainer

    monkeypatch.setattr(trainer, "label_loss", lambda *_: LabelLoss(torch.tensor(float("nan")), 3))
    with pytest.raises(TrainingDiverged, match="learning rate"):
        train(plan, quiet())
    assert not plan.out.exists()


def test_unreadable_data_is_refused_before_a_model_is_loaded(plan: Plan, tmp_path: Path) -> None:
    plan.data.write_text("{}\n")
    with pytest.raises(DataInvalid, match="line 1"):
        train(replace(plan, base_directory=tmp_path / "no model here"), quiet())
    assert not plan.out.with_name("out.checkpoints").exists()


@pytest.mark.parametrize("variant", ["rslora", "dora"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_variants_of_lora_train_and_are_what_peft_calls_them(plan: Plan, variant: str, method: Any) -> None:
    done = train(replace(plan, method=method, recipe=TINY.but(variant=variant)), quiet())
    parsed = parse_adapter(plan.out)
    assert parsed.config.features == (variant,) and not parsed.changes_nothing
    assert done.facts.metrics["validation_loss"] < done.facts.metrics["validation_loss_before"]
    if variant == "rslora":
        config = json.loads((plan.out / "adapter_config.json").read_text())
        assert config["use_rslora"] is True and parsed.config.scaling("model.layers.0.mlp.up_proj", 4) == 8 / 2
