"""Every strategy through the real trainer on the tiny base: rules kept, artifacts served, interruptions harmless."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hub.adapter_dir import parse_adapter
from hub.base import BaseIdentity
from tests.training.continual.conftest import WORDS
from training.base_weights import matrices
from training.continual.contract import Lesson, Outcome, Past
from training.continual.factors import Factors, Pair, read_factors, relative_difference, write_factors
from training.continual.inputs import input_moments
from training.continual.registry import KINDS, strategy_named
from training.continual.rules import SiteRule, govern
from training.continual.stage import StageTrainer
from training.data import Example
from training.errors import TrainingError
from training.recipe import Recipe

TINY = Recipe(
    name="tiny", source="these tests", when="never else", rank=4, alpha=8, learning_rate=5e-3, epochs=1.0, batch=4,
    max_length=200, hold_out=0.1, dropout=0.0, seed=1,
)  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {"replay": {"share": 0.2}, "on-policy-replay": {"share": 0.2}}

pytestmark = [
    pytest.mark.usefixtures("single_precision"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


@pytest.fixture
def trainer(tiny_base: Path) -> StageTrainer:
    return StageTrainer(BaseIdentity("tiny-base", None, None), tiny_base, "lora", TINY, 1, max_steps=3)


def examples_of(label: str) -> tuple[Example, ...]:
    return tuple(Example.of(user=f"{label} {n % 5} {n}", answer=WORDS[label][n % 2]) for n in range(20))


def quiet() -> Console:
    return Console(file=io.StringIO())


def fresh(base: Path, seed: int, rank: int = 4) -> Factors:
    """Random factors on the tiny base's q and v."""
    generator = torch.Generator().manual_seed(seed)
    modules = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in ("q", "v")]
    return {
        module: Pair(
            torch.randn(rank, weight.shape[1], generator=generator) / 8,
            torch.randn(weight.shape[0], rank, generator=generator) / 30,
        )
        for module, weight in matrices(base, modules)
    }


@pytest.mark.parametrize(("name", "more"), [*((name, {}) for name in KINDS), ("aimed", {"again": 1.0})])
def test_two_stages_of_every_strategy(
    name: str, more: dict[str, Any], trainer: StageTrainer, tiny_base: Path, tmp_path: Path
) -> None:
    strategy = strategy_named(name, {**OPTIONS.get(name, {}), **more}, 0.5 if name == "sequential" else None)
    tasks = [examples_of("first"), examples_of("second")]
    asked: list[Factors] = []

    def answers(factors: Factors, drawn: Sequence[Example]) -> Sequence[Example]:
        asked.append(factors)
        return drawn[:-1]

    def losses(adapters: Sequence[Factors], judges: Sequence[Example]) -> list[list[float]]:
        return [[abs(number - 2.0)] * len(judges) for number, _ in enumerate(adapters)]  # half the way is best

    def inputs(factors: Factors, groups: Sequence[tuple[float, Sequence[Example] | None]]) -> dict[str, torch.Tensor]:
        place = tmp_path / f"asked-{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        write_factors(place, factors, "tiny-base")
        read = [(weight, rows) for weight, rows in groups if rows]
        return input_moments(tiny_base, place, read, quantized=False)

    further: list[Lesson[Example]] = []

    def train(lesson: Lesson[Example]) -> Factors:
        further.append(lesson)
        done = trainer.fit(lesson, tmp_path / f"again-{len(further)}", quiet()).factors
        for module, pair in lesson.start.items() if lesson.start else ():
            assert torch.equal(done[module].a, pair.a)
            assert not torch.equal(done[module].b, pair.b)
        return done

    outcomes: list[Outcome[Example]] = []
    for stage, examples in enumerate(tasks):
        past = Past(
            stage, examples, tuple(outcomes), tuple(tasks[:stage]), answers, lambda rows: rows, losses, inputs, train,
            lambda modules: matrices(tiny_base, modules), 0,
        )  # fmt: skip
        lesson = strategy.lesson(past)
        trained = trainer.fit(lesson, tmp_path / str(stage), quiet())
        outcomes.append(strategy.finish(past, trained.factors))
        assert trained.facts.metrics["steps"] == 3
    before, after = outcomes[0].served, outcomes[1].served
    rank = {"aimed": 8, "o-lora": 8, "osf": 8, "merge": 8}.get(name, 4)
    assert {pair.rank for pair in after.values()} == {rank} and len(after) == 14
    assert relative_difference(before, after) > 1e-3
    if name in ("aimed", "o-lora", "osf"):
        for module, pair in after.items():
            assert torch.equal(pair.a[:4], before[module].a) and torch.equal(pair.b[:, :4], before[module].b)
            assert float(pair.b[:, 4:].abs().max()) > 0
    if name == "osf":
        for module, weight in matrices(tiny_base, after):
            u, _, vt = torch.linalg.svd(weight + before[module].delta(), full_matrices=False)
            half, new = min(weight.shape) // 2, Pair(after[module].a[4:], after[module].b[:, 4:])
            assert float((u[:, :half].T @ new.b).abs().max()) < 1e-5 and float((new.a @ vt[:half].T).abs().max()) < 1e-5
    assert bool(asked) == (name == "on-policy-replay") and len(further) == (2 if more else 0)
    place = tmp_path / "served"
    place.mkdir()
    write_factors(place, after, "tiny-base")
    parsed = parse_adapter(place)
    assert not parsed.changes_nothing and set(parsed.ranks.values()) == {rank}


def test_what_is_written_is_what_peft_computes(tiny_base: Path, tmp_path: Path) -> None:
    """Unequal ranks too; the merged weights are the base's plus b a."""
    import peft
    from transformers import AutoModelForCausalLM

    factors = dict(fresh(tiny_base, 1))
    grown = "model.layers.1.self_attn.q_proj"
    other = fresh(tiny_base, 2, rank=3)[grown]
    factors[grown] = Pair(torch.cat([factors[grown].a, other.a]), torch.cat([factors[grown].b, other.b], 1))
    write_factors(tmp_path, factors, str(tiny_base))
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload()
    for module, weight in matrices(tiny_base, factors):
        assert torch.allclose(model.get_submodule(module).weight, weight + factors[module].delta(), atol=1e-6)
    assert relative_difference(factors, read_factors(tmp_path)) == 0


def test_a_stage_begins_where_it_is_told(trainer: StageTrainer, tiny_base: Path, tmp_path: Path) -> None:
    """At a rate of nothing, what comes out is what went in: the start is loaded exactly, its scale included."""
    still = StageTrainer(trainer.base, tiny_base, "lora", TINY.but(learning_rate=1e-9, weight_decay=0.0), 1, 1)
    first = trainer.fit(Lesson(examples_of("first")), tmp_path / "0", quiet()).factors
    second = still.fit(Lesson(examples_of("second"), start=first), tmp_path / "1", quiet()).factors
    assert relative_difference(first, second) < 1e-5


def test_nf4_training_keeps_frozen_rows_bit_for_bit(trainer: StageTrainer, tiny_base: Path, tmp_path: Path) -> None:
    """TRL rounds adapters on a quantized base to bfloat16; rows that are to stay must not notice."""
    quantized = StageTrainer(trainer.base, tiny_base, "qlora", TINY, 1, 2)
    first = trainer.fit(Lesson(examples_of("first")), tmp_path / "0", quiet()).factors
    rules = {module: SiteRule(pair.rank, pair.a, 0.5) for module, pair in first.items()}
    lesson = Lesson(examples_of("second"), start=first, grow=True, rules=rules)
    second = quantized.fit(lesson, tmp_path / "1", quiet())
    for module, pair in second.factors.items():
        assert torch.equal(pair.a[:4], first[module].a) and torch.equal(pair.b[:, :4], first[module].b)
    assert second.facts.base is not None and second.facts.base.quantization == "nf4"
    written = read_factors(tmp_path / "1" / "trained")  # held() has not touched these
    assert all(torch.allclose(pair.a[:4], first[module].a, atol=1e-7) for module, pair in written.items())


def test_modules_must_be_the_same(trainer: StageTrainer, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the recipe's modules are not the earlier adapter's"):
        trainer.fit(Lesson(examples_of("first"), start=fresh(tiny_base, 1)), tmp_path, quiet())


def test_the_penalty_is_a_loss_terms_gradient() -> None:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    start, x, y = Pair(draw(5, 7), draw(6, 5)), draw(9, 7), draw(9, 6)
    rule = SiteRule(frozen=2, avoid=draw(3, 7), avoid_weight=0.7)

    def loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (x @ (b @ a).T - y).square().mean()

    a, b = torch.nn.Parameter(start.a.clone()), torch.nn.Parameter(start.b.clone())
    govern(a, b, rule)
    loss(a, b).backward()
    plain_a, plain_b = start.a.clone().requires_grad_(), start.b.clone().requires_grad_()
    (loss(plain_a, plain_b) + rule.penalty(plain_a)).backward()
    assert a.grad is not None and b.grad is not None and plain_a.grad is not None and plain_b.grad is not None
    assert torch.allclose(a.grad[2:], plain_a.grad[2:], atol=1e-5) and not a.grad[:2].any()
    assert torch.allclose(b.grad[:, 2:], plain_b.grad[:, 2:], atol=1e-6) and not b.grad[:, :2].any()
