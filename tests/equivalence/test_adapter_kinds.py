"""Adapters that are more than rank rows mean what PEFT makes of them in float32, in one batch with everybody else."""

import gc
import json
import random
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from server.errors import InvalidRequest, TensorUnbound, UnsupportedAdapter
from server.kernels import native
from tests.conftest import write_byte_tokenizer, write_tiny_llama
from tests.equivalence.kinds import ALONE, TOKENS, write_kinds
from tests.equivalence.reference import World, ask, assert_same, build, load
from tests.equivalence.reference import random_prompt as any_prompt

# PEFT warns of biases it has no merged form for, of tied weights, and that it saves embeddings.
pytestmark = [
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module", params=["tied", "untied", "biased"])
def world(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    directory_fetch: Callable[[dict[str, Path]], Any],
) -> Iterator[World]:
    root = tmp_path_factory.mktemp("kinds")
    base = root / "base"
    biased = request.param == "biased"
    write_tiny_llama(
        base,
        seed=random.randrange(2**31),
        tie_word_embeddings=request.param == "tied",
        attention_bias=biased,
        mlp_bias=biased,
    )
    write_byte_tokenizer(base)
    if biased:  # transformers starts them at zero
        weights = load_file(base / "model.safetensors")
        drawn = {key: torch.randn_like(w) * 0.2 if key.endswith("bias") else w for key, w in weights.items()}
        save_file(drawn, base / "model.safetensors", metadata={"format": "pt"})
    adapters = write_kinds(base, root, biased)
    engine = build(base, directory_fetch(adapters))
    yield World(base, adapters, engine)
    engine.check_integrity()
    engine.close()


def random_prompt() -> list[int]:
    """With several of the trained tokens in it."""
    return [*any_prompt(), *random.sample(TOKENS, 3)]


def test_all_kinds_in_one_batch_equal_peft(world: World) -> None:
    kinds: list[str | None] = [*world.adapters, None, None, "plain"]
    random.shuffle(kinds)
    prompts = [random_prompt() for _ in kinds]
    answers = world.engine.generate(
        [ask(prompt, *([kind] if kind else [])) for kind, prompt in zip(kinds, prompts, strict=True)]
    )
    for kind, prompt, answer in zip(kinds, prompts, answers, strict=True):
        assert_same(answer, world.load(kind), prompt, kind)


@pytest.mark.parametrize("way", ["native", "torch"])
def test_deterministic_answers_are_pefts(
    world: World, directory_fetch: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        monkeypatch.setattr(native, "load", lambda dtype: None)
    engine = build(world.base, directory_fetch(world.adapters), deterministic=True)
    dora = [kind for kind in world.adapters if kind.startswith("dora")]
    kinds = [*dora, None, *random.sample(sorted(world.adapters.keys() - set(dora)), 5)]
    random.shuffle(kinds)
    prompts = [random_prompt() for _ in kinds]
    try:
        answers = engine.generate(
            [ask(prompt, *([kind] if kind else [])) for kind, prompt in zip(kinds, prompts, strict=True)]
        )
    finally:
        engine.close()
    for kind, prompt, answer in zip(kinds, prompts, answers, strict=True):
        assert_same(answer, world.load(kind), prompt, kind)


def test_every_kind_changes_the_answer(world: World) -> None:
    """The comparison above would also pass where a kind does nothing on either side."""
    prompt = random_prompt()
    kinds = list(world.adapters)
    base, *adapted = world.engine.generate([ask(prompt), *(ask(prompt, kind) for kind in kinds)])
    first = [base.deltas[0].logprobs[0].logprob, *(a.deltas[0].logprobs[0].logprob for a in adapted)]
    assert len({round(value, 4) for value in first}) >= len(first) - 2


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5), (-0.4, 1.6)])
@pytest.mark.parametrize("pair", [("dora", "lora-bias"), ("dora-head", "lora-head"), ("lora-both", "dora-rslora")])
def test_weighted_kinds_equal_the_sum_of_deltas(
    world: World, pair: tuple[str, str], weights: tuple[float, float]
) -> None:
    """Each adapter's delta, merged by PEFT into a base of its own, times its weight; added up on the pristine base."""
    prompt = random_prompt()
    asked = tuple(zip(pair, weights, strict=True))
    answer = world.engine.generate([ask(prompt, *asked)])[0]
    summed = untied(world.load(None))
    original = {name: parameter.clone() for name, parameter in summed.named_parameters()}
    hooks = []
    with torch.no_grad():
        for kind, weight in asked:
            bias = kind == "lora-bias"
            adapted = peft.PeftModel.from_pretrained(untied(load(world.base)), world.adapters[kind])
            if bias:  # no merged form where the base has no bias: added to the outputs instead
                for name, module in adapted.base_model.model.named_modules():
                    if isinstance(module, peft.tuners.lora.Linear):
                        shift = weight * module.scaling["default"] * module.lora_B["default"].bias
                        target = summed.get_submodule(name)
                        hooks.append(target.register_forward_hook(lambda m, i, out, shift=shift: out + shift))
                        target.weight += weight * module.get_delta_weight("default")
                continue
            merged = adapted.merge_and_unload()
            for name, parameter in merged.named_parameters():
                summed.get_parameter(name).add_(weight * (parameter - original[name]))
    assert_same(answer, summed, prompt)


def untied(model: Any) -> Any:
    """The same function with a head of its own."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


def test_what_replaces_values_is_used_alone_and_whole(world: World) -> None:
    prompt = random_prompt()
    for kind in (kind for kind in ALONE if kind in world.adapters):
        good, half, together = world.engine.generate(
            [ask(prompt), ask(prompt, (kind, 0.5)), ask(prompt, "plain", kind)]
        )
        assert good.error is None
        for refused in (half, together):
            assert isinstance(refused.error, InvalidRequest), kind
            assert f"t/{kind}@1 uses" in str(refused.error)
    assert world.engine.adapters.leases() == 0


def test_rows_without_parts_run_the_base_modules_own_code(world: World, directory_fetch: Any) -> None:
    engine = build(world.base, directory_fetch(world.adapters))
    try:
        engine.generate([ask(random_prompt(), "plain"), ask(random_prompt())])
        assert not engine._computing.part_hooks._hooked
    finally:
        engine.close()


INSIDE = ["saved-norms", "saved-linear"]


def test_what_is_not_replaced_leaves_the_layers_fused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA, biases, heads, embeddings and tokens run natively beside everybody else, and mean what PEFT makes of them;
    only a replaced module within the layers makes these call their single modules."""
    seen: set[bool] = set()
    use = world.engine._computing.active.use

    def watched(segments: Any, decodes: int, plain: bool = True, affine: Any = None) -> None:
        seen.add(plain)
        use(segments, decodes, plain, affine)

    monkeypatch.setattr(world.engine._computing.active, "use", watched)
    kinds = [kind for kind in world.adapters if kind not in INSIDE]
    random.shuffle(kinds)
    prompts = {kind: random_prompt() for kind in kinds}
    answers = world.engine.generate([ask(prompt, kind) for kind, prompt in prompts.items()])
    assert seen == {True}
    for (kind, prompt), answer in zip(prompts.items(), answers, strict=True):
        assert_same(answer, world.load(kind), prompt, kind)
    for kind in INSIDE:
        seen.clear()
        world.engine.generate([ask(random_prompt(), "plain"), ask(random_prompt(), kind)])
        assert False in seen, kind


def test_parts_count_against_their_memory(world: World, directory_fetch: Any) -> None:
    """Room for one replaced head at a time: all are served by turns; an adapter that can never fit is refused."""
    head = 300 * 64 * 4
    engine = build(world.base, directory_fetch(world.adapters), adapter_parts_memory_bytes=head + 4096)
    try:
        prompt = random_prompt()
        answers = engine.generate([ask(prompt, kind) for kind in ("saved-head", "saved-embedding") * 3])
        assert all(answer.error is None for answer in answers)
        (too_big,) = engine.generate([ask(prompt, "saved-both")])
        assert getattr(too_big.error, "reason", None) == "REQUEST_TOO_LARGE"
        resident = {status.digest: status for status in engine.adapters.list() if status.tier.value == "device"}
        heads = [kind for kind in ("saved-head", "saved-embedding") if kind in resident]
        assert len(heads) == 1
        assert resident[heads[0]].device_bytes > head
        engine.check_integrity()
    finally:
        engine.close()


def test_unloading_frees_the_parts(world: World, directory_fetch: Any) -> None:
    engine = build(world.base, directory_fetch(world.adapters))
    try:
        assert engine.generate([ask(random_prompt(), "saved-head")])[0].error is None
        held = weakref.ref(engine.adapters._device["saved-head"].parts.modules["lm_head"].replacement.weight)
        assert held() is not None
        assert engine.adapters.unload("saved-head")
        gc.collect()
        assert held() is None
    finally:
        engine.close()


Files = tuple[dict[str, Any], dict[str, torch.Tensor]]


def to_target_parameters(files: Files) -> None:
    files[0]["target_parameters"] = ["experts.down_proj"]


def to_alora(files: Files) -> None:
    files[0]["alora_invocation_tokens"] = [1, 2]


def to_pissa(files: Files) -> None:
    files[0]["init_lora_weights"] = "pissa"


def another_copy(files: Files) -> None:
    files[1]["base_model.model.model.embed_tokens.base_layer.weight"] += 1e-3


def unknown_module(files: Files) -> None:
    files[1]["base_model.model.model.layers.9.mlp.up_proj.lora_magnitude_vector"] = torch.ones(128)


def saved_with_another_shape(files: Files) -> None:
    files[1]["base_model.model.lm_head.weight"] = torch.zeros(301, 64)


def a_parameter_nobody_has(files: Files) -> None:
    files[1]["base_model.model.lm_head.gain"] = torch.zeros(64)


def tied_by_the_config(files: Files) -> None:
    files[0]["ensure_weight_tying"] = True


def a_token_beyond_the_vocabulary(files: Files) -> None:
    files[0]["trainable_token_indices"] = [*TOKENS[:-1], 300]


def a_magnitude_of_another_width(files: Files) -> None:
    key = next(key for key in files[1] if key.endswith("magnitude_vector"))
    files[1][key] = files[1][key][:-1].clone()


@pytest.mark.parametrize(
    ("kind", "change", "reason", "named"),
    [
        ("plain", to_target_parameters, UnsupportedAdapter.reason, "target_parameters"),
        ("plain", to_alora, UnsupportedAdapter.reason, "alora"),
        ("plain", to_pissa, "BASE_CHANGED_INIT", "pissa"),
        ("lora-embedding", another_copy, UnsupportedAdapter.reason, "embed_tokens"),
        ("dora", unknown_module, TensorUnbound.reason, "layers.9"),
        ("dora", a_magnitude_of_another_width, TensorUnbound.reason, "layers."),
        ("saved-head", saved_with_another_shape, TensorUnbound.reason, "lm_head"),
        ("saved-head", a_parameter_nobody_has, TensorUnbound.reason, "gain"),
        ("tokens", a_token_beyond_the_vocabulary, TensorUnbound.reason, "embed_tokens"),
        ("saved-embedding", tied_by_the_config, UnsupportedAdapter.reason, "ensure_weight_tying"),
    ],
)
def test_what_has_no_exact_meaning_is_refused_by_name(
    world: World,
    kind: str,
    change: Callable[[Files], None],
    reason: str,
    named: str,
    tmp_path: Path,
    directory_fetch: Any,
) -> None:
    source = world.adapters[kind]
    config = json.loads((source / "adapter_config.json").read_text())
    files: Files = (config, load_file(source / "adapter_model.safetensors"))
    change(files)
    (tmp_path / "adapter_config.json").write_text(json.dumps(files[0]))
    save_file(files[1], tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    base_is_tied = world.load(None).config.tie_word_embeddings
    engine = build(world.base, directory_fetch({"changed": tmp_path, "plain": world.adapters["plain"]}))
    try:
        bad, good = engine.generate([ask([1, 2], "changed"), ask([1, 2], "plain")])
    finally:
        engine.close()
    assert good.error is None
    if change is tied_by_the_config and not base_is_tied:
        assert bad.error is None  # it says nothing where there is nothing to tie
        return
    assert getattr(bad.error, "reason", bad.error) == reason
    assert named in str(bad.error)
