"""Adapters that begin with what NF4 took: against an exact SVD, and against the base in full precision."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hub.adapter_dir import parse_adapter
from hub.base import BaseIdentity
from training import finetune, trainable
from training.base_weights import matrices
from training.encode import Encoded
from training.errors import MethodUnsupported
from training.finetune import Plan, train
from training.qera import give_back, low_rank
from training.recipe import Recipe

QERA = Recipe(
    name="tiny", source="these tests", when="never else", rank=6, alpha=18, learning_rate=5e-3, epochs=3.0, batch=4,
    max_length=200, hold_out=0.2, dropout=0.0, seed=1, init="qera",
)  # fmt: skip

pytestmark = [
    pytest.mark.usefixtures("single_precision"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def plan(tiny_base: Path, chat_file: Path, tmp_path: Path) -> Plan:
    base = BaseIdentity("tiny-base", None, "sha256:" + "0" * 64)
    return Plan(chat_file, base, tiny_base, QERA, tmp_path / "out", method="qlora", threads=1, checkpoint_steps=2)


def quiet() -> Console:
    return Console(file=io.StringIO())


def examples() -> list[Encoded]:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 200, (length,), generator=generator).tolist() for length in (5, 17, 9, 30, 12)]
    return [Encoded(tuple(row), tuple(row)) for row in rows]


def models(base: Path, recipe: Recipe) -> tuple[Any, Any]:
    """(the base in float32, the base in NF4 with a fresh adapter)."""
    torch.manual_seed(0)
    exact: Any = trainable.load_base(base, "lora", 200, "cpu", torch.float32)
    adapted = trainable.make_trainable(base, str(base), "qlora", recipe, "cpu").model
    trainable.float32_adapters(adapted)
    return exact.eval(), adapted.eval()


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(torch.tensor([one.input_ids])).logits[0] for one in examples()])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (50, 50)])
def test_low_rank_is_as_near_as_an_exact_svd(seed: int, shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    a, b = low_rank(matrix, 8)
    assert a.shape == (8, shape[1]) and b.shape == (shape[0], 8)
    best = float(torch.linalg.svdvals(matrix)[8:].norm())
    assert best * (1 - 1e-5) <= float((matrix - b @ a).norm()) < best * 1.005
    assert torch.allclose(a.norm(dim=1), b.norm(dim=0), rtol=1e-4)


def test_a_rank_beyond_the_matrix_is_filled_up_with_nothing() -> None:
    matrix = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    a, b = low_rank(matrix, 7)
    assert torch.allclose(b @ a, matrix, atol=1e-5) and not a[5:].any() and not b[:, 5:].any()


@pytest.mark.parametrize("variant", ["plain", "rslora"])
def test_with_every_rank_the_base_is_whole_again(tiny_base: Path, variant: str) -> None:
    """Scales included: no rounding is left, and what comes out is what the base in float32 says."""
    exact, adapted = models(tiny_base, QERA.but(rank=256, alpha=100, variant=variant))
    wanted, rounded = outputs(exact), outputs(adapted)
    assert float((rounded - wanted).abs().max()) > 1e-2
    assert give_back(adapted, tiny_base, examples(), 0) < 1e-4
    assert torch.allclose(outputs(adapted), wanted, atol=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_a_few_ranks_bring_the_outputs_nearer(tiny_base: Path, seed: int) -> None:
    exact, adapted = models(tiny_base, QERA)
    wanted = outputs(exact)
    apart = float((outputs(adapted) - wanted).norm())
    left = give_back(adapted, tiny_base, examples(), seed)
    assert 0 < left < 0.95
    assert float((outputs(adapted) - wanted).norm()) < 0.95 * apart


def test_what_is_left_is_weighed_by_what_comes_in(tiny_base: Path) -> None:
    """Against the definition, with inputs read one example at a time."""
    import bitsandbytes as bnb

    _, adapted = models(tiny_base, QERA)
    squares: dict[str, torch.Tensor] = {}
    layers = {n.removeprefix("base_model.model."): m for n, m in adapted.named_modules() if hasattr(m, "lora_A")}
    for name, layer in layers.items():
        squares[name] = torch.zeros(layer.in_features)

        def read(_: Any, given: tuple[Any, ...], name: str = name) -> None:
            squares[name] += given[0][0].square().sum(0)

        layer.register_forward_pre_hook(read)
    outputs(adapted)
    found = {name: total / sum(len(one.input_ids) for one in examples()) for name, total in squares.items()}
    left = give_back(adapted, tiny_base, examples(), 0)
    before = after = 0.0
    for name, weight in matrices(tiny_base, layers):
        layer = layers[name]
        held = layer.base_layer.weight
        error = weight - bnb.functional.dequantize_4bit(held.data, held.quant_state).float()
        a, b = (getattr(layer, half)["default"].weight.detach() for half in ("lora_A", "lora_B"))
        delta = b @ a * layer.scaling["default"]
        before += float((error.square() * found[name]).sum())
        after += float(((error - delta).square() * found[name]).sum())
        best = torch.linalg.svdvals(error.double() * found[name].double().sqrt())[6:].square().sum()
        assert float(((error - delta).square() * found[name]).sum()) < 1.01 * float(best)
    assert left == pytest.approx((after / before) ** 0.5, rel=1e-3)


def test_a_run_begins_nearer_to_the_whole_base_and_the_hub_takes_what_comes_out(plan: Plan, tmp_path: Path) -> None:
    few = replace(plan, max_steps=2, recipe=QERA.but(rank=32, alpha=32))
    begun = {}
    for name, one in {
        "qera": few,
        "random": replace(few, recipe=few.recipe.but(init="random")),
        "exact": replace(few, recipe=few.recipe.but(init="random", method="lora"), method="lora"),
    }.items():
        facts = train(replace(one, out=tmp_path / name), quiet()).facts
        begun[name] = facts.metrics["validation_loss_before"]
        assert facts.recipe.get("init", "random") == ("qera" if name == "qera" else "random")
    assert abs(begun["qera"] - begun["exact"]) < 0.5 * abs(begun["random"] - begun["exact"])
    parsed = parse_adapter(tmp_path / "qera")
    assert set(parsed.ranks.values()) == {32} and not parsed.changes_nothing


def test_an_interrupted_run_goes_on_from_its_weights(plan: Plan, tmp_path: Path, monkeypatch: Any) -> None:
    from training.progress import ProgressLine

    whole = train(replace(plan, out=tmp_path / "whole"), quiet())
    begun: list[int] = []
    original = finetune.give_back
    monkeypatch.setattr(finetune, "give_back", lambda *args: begun.append(1) or original(*args))
    with monkeypatch.context() as cut:

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                raise InterruptedError

        cut.setattr(ProgressLine, "on_step_end", on_step_end)
        with pytest.raises(InterruptedError):
            train(plan, quiet())
    resumed = train(replace(plan, resume=True), quiet())
    assert begun == [1] and resumed.losses == whole.losses[2:]
    ours, theirs = (load_file(one.out / "adapter_model.safetensors") for one in (resumed, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(("method", "variant"), [("lora", "plain"), ("full", "plain"), ("qlora", "dora")])
def test_it_is_for_an_adapter_on_an_nf4_base(plan: Plan, method: Any, variant: str) -> None:
    with pytest.raises(MethodUnsupported, match="init qera"):
        train(replace(plan, method=method, recipe=QERA.but(variant=variant)), quiet())
    assert not list(plan.out.parent.glob("out*"))
