"""Predictions against what really happens: the same step with real tensors, every storage counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from hub.cli import group
from training import rehearsal as rehearsing
from training.advice import advise
from training.data import Example, write_jsonl
from training.encode import Encoded, EncodedSet
from training.loss import label_loss
from training.planner import Data, Machine, Option, flops_of, seconds_of, weigh
from training.presets import ARTICLES, named_recipe
from training.recipe import Recipe
from training.rehearsal import Shape, rehearse, rehearse_all_layers
from training.trainable import float32_adapters, make_trainable

pytestmark = [
    pytest.mark.usefixtures("single_precision"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
SHAPE = Shape(4, 96, 60)
RECIPE = named_recipe("demo").but(rank=8, max_length=200)


def really(base: Path, method: Any, recipe: Recipe) -> tuple[int, int]:
    """(peak bytes of tensors, trained parameters) of one real forward and backward."""
    made = make_trainable(base, "", method, recipe, "cpu")
    float32_adapters(made.model)
    model = made.model.get_base_model() if hasattr(made.model, "get_base_model") else made.model
    model.train()
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    held = rehearsing._bytes([*made.model.parameters(), *made.model.buffers()])
    moments = 8 * made.trained
    ids = torch.randint(0, 250, (SHAPE.rows, SHAPE.length), generator=torch.Generator().manual_seed(3))
    labels = torch.full_like(ids, -100)
    labels[:, -SHAPE.label_tokens // SHAPE.rows :] = 7
    with rehearsing._Watch() as watch:
        label_loss(model, ids, torch.ones_like(ids), labels).total.backward()  # type: ignore[no-untyped-call]
    if method == "qlora":  # the scales are no parameters of bitsandbytes' layers
        held += sum(
            state.absmax.numel() + 4 * state.state2.absmax.numel()
            for state in (getattr(getattr(m, "weight", None), "quant_state", None) for m in model.modules())
            if state is not None
        )
    return held + moments + watch.peak, made.trained


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_peak_is_predicted_within_a_few_percent(
    tiny_base: Path, method: str, dropout: float, checkpointing: bool
) -> None:
    recipe = RECIPE.but(dropout=dropout, gradient_checkpointing=checkpointing)
    told = rehearse(tiny_base, method, recipe, SHAPE, "cpu", torch.float32)
    peak, trained = really(tiny_base, method, recipe)
    assert told.trained == trained
    assert told.optimizer == 8 * trained and told.gradients == 4 * trained
    assert told.peak == pytest.approx(peak, rel=0.15)


def test_checkpointing_costs_work_and_saves_memory(tiny_base: Path) -> None:
    plain, checkpointed = (
        rehearse(tiny_base, "lora", RECIPE.but(gradient_checkpointing=on), SHAPE, "cpu", torch.float32)
        for on in (False, True)
    )
    assert checkpointed.activations < plain.activations
    assert 1.2 < checkpointed.linear_flops / plain.linear_flops < 1.6


def test_operations_are_those_of_the_formula(tiny_base: Path) -> None:
    # Full: a product is computed once forward and twice backward; the embedding is looked up.
    told = rehearse(tiny_base, "full", RECIPE, SHAPE, "cpu", torch.float32)
    layers = told.trained - 300 * 64 - 5 * 64
    head = 300 * 64
    wanted = 6 * (layers * SHAPE.rows * SHAPE.length + head * SHAPE.label_tokens)
    assert told.linear_flops == pytest.approx(wanted, rel=0.001)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_shallow_models_tell_a_deep_one(tiny_base: Path, tmp_path: Path, checkpointing: bool) -> None:
    from tests.conftest import write_tiny_llama  # type: ignore[import-not-found]

    write_tiny_llama(tmp_path, num_hidden_layers=7)
    recipe = RECIPE.but(gradient_checkpointing=checkpointing)
    for method in ("lora", "qlora"):
        arguments = (tmp_path, method, recipe, SHAPE, "cpu", torch.float32)
        assert rehearse(*arguments) == rehearse_all_layers(*arguments)


def test_the_largest_batch_and_the_operations(tiny_base: Path) -> None:
    lengths = [3, 9, 5, 9, 2]
    examples = tuple(Encoded((1,) * length, (-100,) * (length - 2) + (1, 1)) for length in lengths)
    data = Data.of(EncodedSet(examples, 0), RECIPE.but(batch=2))
    assert data == Data(5, 28, sum(length**2 for length in lengths), Shape(2, 9, 4))
    told = rehearse(tiny_base, "lora", RECIPE, data.longest, "cpu", torch.float32)
    twice = replace(data, tokens=56, squared_lengths=2 * data.squared_lengths)
    assert flops_of(told, twice, RECIPE) == pytest.approx(2 * flops_of(told, data, RECIPE))


def test_time_is_that_of_the_products_and_of_an_update_a_step(tiny_base: Path) -> None:
    data = Data(10, 1000, 80_000, SHAPE)
    told = rehearse(tiny_base, "lora", RECIPE, SHAPE, "cpu", torch.float32)
    recipe = RECIPE.but(batch=4, accumulation=2, epochs=3.0)  # two steps a pass, of which one is not full
    products = flops_of(told, data, recipe) / 1e9
    machine = Machine("a test's", "cpu", 10**9, 0, 1e9, torch.float32, update=1e-6)
    assert seconds_of(told, data, recipe, "lora", machine) == pytest.approx(products + 6 * told.trained * 1e-6)
    for dtype, times in ((torch.float32, 1.19), (torch.bfloat16, 1.15)):
        slower = replace(machine, dtype=dtype, update=0.0)
        assert seconds_of(told, data, recipe, "qlora", slower) == pytest.approx(products * times)


def options_that_fit(tiny_base: Path, memory: int) -> tuple[Data, list[Option]]:
    data = Data(2000, 100_000, 8_000_000, SHAPE)
    machine = Machine("a test's", "cpu", memory, 0, 1e9, torch.float32)
    return data, weigh(tiny_base, RECIPE, data, machine, 2.0)


def test_reasons_follow_the_case_and_the_choice_fits(tiny_base: Path) -> None:
    data, roomy = options_that_fit(tiny_base, 10**9)
    assert all(option.fits for option in roomy)
    assert all(option.cost == pytest.approx(option.seconds / 1800) for option in roomy)
    easy = advise(data, roomy, "format", critical=False)
    assert easy.choice is not None and (easy.choice.method, easy.choice.checkpointing) == ("lora", False)
    hard = advise(data, roomy, "reasoning", critical=True)
    assert hard.choice is not None and hard.choice.method == "full"
    cheap = advise(data, roomy, "cost", critical=False)
    assert cheap.choice is not None and cheap.choice.method == "qlora"
    assert any("7 to 13 billion" in reason.text and reason.source == "article 003" for reason in cheap.reasons)
    assert any("QLoRA to experiment" in reason.text and reason.source == "article 000" for reason in easy.reasons)
    few = advise(replace(data, examples=300), roomy, None, critical=False)
    assert few.first.startswith("Try prompts first") and few.reasons[0].speaks_for == "prompts"
    smallest = min(option.memory for option in roomy)
    _, tight = options_that_fit(tiny_base, smallest * 12 // 11 + 100)
    squeezed = advise(data, tight, "format", critical=False)
    assert squeezed.choice is not None and squeezed.choice.memory == smallest
    assert any("full does not fit" in reason.text for reason in squeezed.reasons)
    _, none = options_that_fit(tiny_base, 1000)
    assert advise(data, none, None, critical=False).choice is None


def test_the_verb(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    write_jsonl(path, [Example.of(user=f"text {n}", answer="yes") for n in range(30)])

    def run(*args: str) -> Any:
        common = ["advise", "--base", str(tiny_base), "--data", str(path), "--threads", "1", *args]
        return CliRunner().invoke(group, common, catch_exceptions=False)

    table = run("--gpu-memory", "24GB", "--price-per-hour", "1").stdout
    for words in ("full", "qlora", "peak", "cost", "→", "Try prompts first", "articles 000, 003", ARTICLES):
        assert words in table
    told = json.loads(run("--gpu", "l4", "--json").stdout)
    assert told["machine"]["memory"] == 24 * 10**9 and len(told["options"]) == 6
    assert told["choice"]["method"] == "lora" and told["data"]["examples"] == 28
    assert run("--gpu-memory", "much").exit_code == 2


def test_a_precision_whose_speed_is_not_known_on_gpus_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("")
    asked = ["advise", "--base", str(tiny_base), "--data", str(data), "--gpu", "l4", "--precision", "float32"]
    result = CliRunner().invoke(group, asked)
    assert result.exit_code == 2 and "only the speed in bfloat16 is known" in result.output
