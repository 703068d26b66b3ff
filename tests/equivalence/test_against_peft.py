"""What an adapter means is what PEFT and transformers' generate() make of it in float32."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.equivalence.reference import World, ask, assert_alike, assert_same, build, random_prompt

# One LoRA feature each, and ranks 4 to 64 mixed.
KINDS: dict[str, dict[str, Any]] = {
    "r4": {"r": 4, "lora_alpha": 4},
    "r8": {"r": 8, "lora_alpha": 16},
    "r12": {"r": 12, "lora_alpha": 5},
    "r16": {"r": 16, "lora_alpha": 32},
    "r24": {"r": 24, "lora_alpha": 48},
    "r32": {"r": 32, "lora_alpha": 64},
    "r48": {"r": 48, "lora_alpha": 48},
    "r64": {"r": 64, "lora_alpha": 128},
    "attention-only": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "mlp-only": {"r": 16, "target_modules": ["down_proj"]},
    "rslora": {"r": 16, "lora_alpha": 8, "use_rslora": True},
    "rank-pattern": {"r": 8, "rank_pattern": {"q_proj": 20, "layers.1.mlp.down_proj": 3}},
    "alpha-pattern": {"r": 8, "lora_alpha": 8, "alpha_pattern": {"v_proj": 40, "layers.0.self_attn.q_proj": 2}},
    "one-layer": {"r": 8, "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def world(
    tiny_base: Path,
    tmp_path_factory: pytest.TempPathFactory,
    make_adapter: Callable[..., Path],
    directory_fetch: Callable[[dict[str, Path]], Any],
) -> Iterator[World]:
    root = tmp_path_factory.mktemp("adapters")
    adapters = {
        kind: make_adapter(tiny_base, root / kind, seed=random.randrange(2**31), **config)
        for kind, config in KINDS.items()
    }
    engine = build(tiny_base, directory_fetch(adapters))
    yield World(tiny_base, adapters, engine)
    engine.check_integrity()
    engine.close()


def test_one_mixed_batch_equals_peft_one_at_a_time(world: World) -> None:
    """14 adapters of ranks 4 to 64 and two base rows share every step."""
    kinds: list[str | None] = [*KINDS, None, None]
    random.shuffle(kinds)
    prompts = [random_prompt() for _ in kinds]
    answers = world.engine.generate(
        [ask(prompt, *([kind] if kind else [])) for kind, prompt in zip(kinds, prompts, strict=True)]
    )
    for kind, prompt, answer in zip(kinds, prompts, answers, strict=True):
        assert_same(answer, world.load(kind), prompt)


@pytest.mark.parametrize("popularity", ["distinct", "uniform", "zipf", "identical"])
def test_however_popular_the_adapters_are(world: World, popularity: str) -> None:
    """Twelve callers a time: rows are grouped by adapter, and none of the groupings may change an answer."""
    kinds = random.sample(list(KINDS), 12)
    weights = [(place + 1) ** -1.2 for place in range(12)] if popularity == "zipf" else None
    drawn = {
        "distinct": kinds,
        "uniform": random.choices(kinds, k=12),
        "zipf": random.choices(kinds, weights, k=12),
        "identical": [kinds[0]] * 12,
    }[popularity]
    prompts = [random_prompt() for _ in drawn]
    answers = world.engine.generate([ask(prompt, kind) for kind, prompt in zip(drawn, prompts, strict=True)])
    models = {kind: world.load(kind) for kind in set(drawn)}
    for kind, prompt, answer in zip(drawn, prompts, answers, strict=True):
        assert_same(answer, models[kind], prompt, kind)


def test_adapters_change_the_answer(world: World) -> None:
    """The comparison above would also pass if nobody's adapter did anything."""
    prompt = random_prompt()
    base, *adapted = world.engine.generate([ask(prompt), *(ask(prompt, kind) for kind in KINDS)])
    assert sum(answer.token_ids != base.token_ids for answer in adapted) >= len(KINDS) - 2


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5), (-0.4, 1.6)])
def test_weighted_adapters_equal_pefts_cat(world: World, weights: tuple[float, float]) -> None:
    prompt = random_prompt()
    first, second = "r16", "rank-pattern"
    answer = world.engine.generate([ask(prompt, (first, weights[0]), (second, weights[1]))])[0]
    assert_same(answer, summed(world, {first: weights[0], second: weights[1]}), prompt)


def summed(world: World, weights: dict[str, float]) -> Any:
    """base + Σ wᵢΔWᵢ with each ΔW taken from PEFT itself (its `cat` refuses negative weights and mixed patterns)."""
    base = world.load(None)
    for kind, weight in weights.items():
        adapted = world.load(kind)
        for name, module in adapted.base_model.model.named_modules():
            if isinstance(module, peft.tuners.lora.Linear):
                with torch.no_grad():
                    base.get_submodule(name).weight += weight * module.get_delta_weight("default")
    return base


def test_weighted_adapters_equal_pefts_own_cat(world: World) -> None:
    prompt = random_prompt()
    model = world.load("r8")
    model.load_adapter(str(world.adapters["r16"]), adapter_name="other")
    model.add_weighted_adapter(["default", "other"], [0.6, 0.9], "both", combination_type="cat")
    model.set_adapter("both")
    answer = world.engine.generate([ask(prompt, ("r8", 0.6), ("r16", 0.9))])[0]
    assert_same(answer, model, prompt)


def test_the_company_changes_nothing(world: World) -> None:
    """float32: the same tokens alone, in a crowd, and in another crowd."""
    kinds = list(KINDS)
    asked = [(kind, random_prompt()) for kind in kinds]
    alone = [world.engine.generate([ask(prompt, kind)])[0] for kind, prompt in asked]
    for _ in range(2):
        crowd = [ask(random_prompt(), random.choice(kinds)) for _ in range(12)]
        requests = [ask(prompt, kind) for kind, prompt in asked]
        mixed = [*requests, *crowd]
        random.shuffle(mixed)
        answers = dict(zip((r.id for r in mixed), world.engine.generate(mixed), strict=True))
        for wanted, own in zip(alone, requests, strict=True):
            assert_alike(answers[own.id], wanted)


def test_prompts_in_chunks(tiny_base: Path, world: World, directory_fetch: Callable[[dict[str, Path]], Any]) -> None:
    """A token budget smaller than the prompt cuts it into several steps and changes no token."""
    prompt = [random.randrange(256) for _ in range(150)]
    engine = build(tiny_base, directory_fetch(world.adapters), max_batch_tokens=19)
    try:
        chunked = engine.generate([ask(prompt, "r32"), ask(random_prompt(), "r4")])[0]
    finally:
        engine.close()
    assert_same(chunked, world.load("r32"), prompt)


def test_more_adapters_than_fit_are_queued(
    tiny_base: Path, world: World, directory_fetch: Callable[[dict[str, Path]], Any]
) -> None:
    """An arena of 72 rows for 14 adapters of up to 64: all are answered, by turns, and rightly."""
    engine = build(tiny_base, directory_fetch(world.adapters), adapter_memory_bytes=72 * 8192)
    try:
        assert 64 <= engine.adapters.rows_total < 100
        prompt = random_prompt()
        kinds = [kind for kind in KINDS for _ in range(2)]
        answers = engine.generate([ask(prompt, kind) for kind in kinds])
        engine.check_integrity()
        assert engine.adapters.leases() == 0
    finally:
        engine.close()
    expected = dict(zip(KINDS, world.engine.generate([ask(prompt, kind) for kind in KINDS]), strict=True))
    for kind, answer in zip(kinds, answers, strict=True):
        assert_alike(answer, expected[kind])
