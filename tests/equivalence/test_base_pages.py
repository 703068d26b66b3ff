"""An adapter that changes no key and no value shares the base's KV pages, both ways; every other shares nothing."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from server.adapters.kv_reach import behind_kv
from tests.conftest import write_byte_tokenizer, write_tiny_llama
from tests.equivalence.reference import World, ask, assert_alike, assert_same, build, load, write_moved_adapter
from tests.equivalence.test_families import FAMILIES, write_family

pytestmark = [
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

LAST = {"layers_to_transform": [1]}
BEHIND = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARING: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "dora-head": {"target_modules": ["lm_head"], "use_dora": True},
    "saved-head": {"target_modules": ["1.self_attn.q_proj"], "modules_to_save": ["lm_head"]},
    "tokens-head": {"target_modules": ["1.self_attn.o_proj"], "trainable_token_indices": {"lm_head": [3, 65, 100]}},
    "last-queries": {"target_modules": ["q_proj"], **LAST},
    "behind": {"target_modules": BEHIND, **LAST, "use_rslora": True},
    "behind-and-head": {"target_modules": r"(lm_head|.*\.1\.(self_attn\.o_proj|mlp\.down_proj))"},
    "nothing": {"target_modules": ["k_proj", "v_proj", "down_proj"]},  # its B is left at zero
}
REACHING: dict[str, dict[str, Any]] = {
    "last-keys": {"target_modules": ["k_proj"], **LAST},
    "last-values": {"target_modules": ["v_proj"], **LAST},
    "one-of-many": {"target_modules": [*BEHIND, "v_proj"], **LAST},
    "first-queries": {"target_modules": ["q_proj"], "layers_to_transform": [0]},
    "first-output": {"target_modules": ["o_proj"], "layers_to_transform": [0]},
    "first-mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"], "layers_to_transform": [0]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding-and-head": {"target_modules": ["embed_tokens", "lm_head"]},
    "tokens": {"target_modules": ["lm_head"], "trainable_token_indices": [3, 65, 100]},
    "saved-embedding": {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
    "norms": {"target_modules": ["lm_head"], "modules_to_save": ["norm"]},
    # These change no key, but are not looked into.
    "last-dora": {"target_modules": ["q_proj"], "use_dora": True, **LAST},
    "last-bias": {"target_modules": ["q_proj"], "lora_bias": True, **LAST},
    "last-trained-bias": {"target_modules": ["q_proj"], "bias": "lora_only", **LAST},
    "last-saved": {"target_modules": ["lm_head"], "modules_to_save": ["1.mlp.down_proj"]},
}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, directory_fetch: Callable[[dict[str, Path]], Any]
) -> Iterator[World]:
    root = tmp_path_factory.mktemp("base-pages")
    base = root / "base"
    write_tiny_llama(base, seed=random.randrange(2**31), tie_word_embeddings=False, attention_bias=True)
    write_byte_tokenizer(base)
    adapters = {
        kind: write_moved_adapter(base, root / kind, **{"r": 4, "lora_alpha": 16, **settings})
        for kind, settings in {**SHARING, **REACHING}.items()
        if kind != "nothing"
    }
    adapters["nothing"] = root / "nothing"
    write_still_adapter(base, adapters["nothing"], **SHARING["nothing"])
    engine = build(base, directory_fetch(adapters))
    yield World(base, adapters, engine)
    engine.check_integrity()
    engine.close()


def write_still_adapter(base: Path, target: Path, **settings: Any) -> None:
    import peft

    peft.get_peft_model(load(base), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)).save_pretrained(target)


def long_prompt() -> list[int]:
    return [random.randrange(256) for _ in range(70)]


FULL_PAGES = 64  # of 16 tokens each, in the first 70


def hits(world: World, prompt: list[int], *uses: str | tuple[str, float]) -> int:
    """Runs one request alone, compares its answer where one adapter has its full weight, and counts found tokens."""
    before = world.engine.snapshot().prefix_hit_tokens
    [answer] = world.engine.generate([ask(prompt, *uses)])
    if len(uses) == 1 and isinstance(uses[0], str):
        assert_same(answer, world.load(uses[0]), prompt, uses[0])
    elif not uses:
        assert_same(answer, world.load(None), prompt)
    assert answer.error is None
    [last] = world.engine.generate([ask([1])])  # the snapshot is taken after a step's answers went out
    assert last.error is None
    return world.engine.snapshot().prefix_hit_tokens - before


@pytest.mark.parametrize("kind", SHARING)
def test_what_changes_no_key_shares_the_bases_pages(world: World, kind: str) -> None:
    prompt = long_prompt()
    assert hits(world, prompt) == 0
    assert hits(world, prompt, kind) == FULL_PAGES
    prompt = long_prompt()
    assert hits(world, prompt, kind) == 0
    assert hits(world, prompt) == FULL_PAGES


@pytest.mark.parametrize("kind", REACHING)
def test_what_may_change_a_key_shares_nothing(world: World, kind: str) -> None:
    prompt = long_prompt()
    assert hits(world, prompt) == 0
    assert hits(world, prompt, kind) == 0
    assert hits(world, prompt, kind) == FULL_PAGES  # but its own
    prompt = long_prompt()
    assert hits(world, prompt, kind) == 0
    assert hits(world, prompt) == 0


def test_in_company_only_those_that_reach_keys_count(world: World) -> None:
    prompt = long_prompt()
    assert hits(world, prompt, "last-queries", ("behind", 0.5)) == 0
    assert hits(world, prompt) == FULL_PAGES
    assert hits(world, prompt, ("behind", -2.0), "head") == FULL_PAGES
    assert hits(world, prompt, "first-mlp", "behind") == 0
    assert hits(world, prompt, "first-mlp") == FULL_PAGES
    assert hits(world, prompt, ("first-mlp", 0.5), "behind") == 0


def test_sharers_answer_together_as_without_a_cache(
    world: World, directory_fetch: Callable[[dict[str, Path]], Any]
) -> None:
    """All kinds at once over one warm prefix, against an engine that caches nothing."""
    beginning = long_prompt()
    prompts = {kind: [*beginning, random.randrange(256)] for kind in ("", *world.adapters)}
    asked = [ask(prompt, *([kind] if kind else [])) for kind, prompt in prompts.items()]
    bare = build(world.base, directory_fetch(world.adapters), prefix_cache=False)
    try:
        expected = bare.generate(asked)
        assert bare.snapshot().prefix_hit_tokens == 0
    finally:
        bare.close()
    hits(world, beginning)
    before = world.engine.snapshot().prefix_hit_tokens
    for wanted, got in zip(expected, world.engine.generate(asked), strict=True):
        assert_alike(got, wanted)
    hits(world, [1])
    assert world.engine.snapshot().prefix_hit_tokens - before >= FULL_PAGES * (1 + len(SHARING))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_lies_behind_the_last_keys(name: str, tmp_path: Path) -> None:
    """Noise on each linear layer of each family, in turn: keys and values change exactly where we say they may."""
    write_family(tmp_path, FAMILIES[name])
    model = load(tmp_path)
    ids = torch.randint(256, (1, 40))
    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".experts." not in path
    }

    @torch.no_grad()
    def cached() -> list[torch.Tensor]:
        cache = model(ids, use_cache=True).past_key_values
        return [tensor.clone() for layer in cache.layers for tensor in (layer.keys, layer.values)]

    before = cached()
    unchanged = set()
    for path, linear in linears.items():
        hook = linear.register_forward_hook(lambda module, inputs, out: out + torch.randn_like(out))
        if all(torch.equal(one, other) for one, other in zip(before, cached(), strict=True)):
            unchanged.add(path)
        hook.remove()
    assert behind_kv(model, "lm_head") == unchanged
    assert {"lm_head"} < unchanged


def test_in_an_unknown_family_only_the_head_is_behind() -> None:
    class StrangeForCausalLM(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = torch.nn.Module()
            layer.mlp = torch.nn.Sequential(torch.nn.Linear(2, 2))
            self.layers = torch.nn.ModuleList([layer])

    assert behind_kv(StrangeForCausalLM(), "lm_head") == {"lm_head"}
    assert behind_kv(StrangeForCausalLM(), None) == frozenset()
