from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.errors import ConfigKeyRefused, ConfigMalformed, TensorUnknown
from hub.lora_config import LoraConfig, TensorSite, parse_tensor_name
from tests.hub.making import CONFIG

MODULES = [f"model.layers.{layer}.{part}" for layer in (0, 1, 10) for part in ("self_attn.q_proj", "mlp.up_proj")]
PATTERNS = st.sampled_from(
    [
        "q_proj", "up_proj", "proj", "model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.1",
        "0.self_attn.q_proj",
        r"^model\.layers\.0\..*", r"layers\.[01]\.mlp\.up_proj", r"layers\.\d+\.self_attn\.q_proj", ".*_proj",
        "^layers",
        "self_attn.q_proj|mlp.up_proj", "(q|up)_proj", "model.layers.10.mlp.up_pro.", "Q_PROJ",
        "(?:q|up)_proj",
    ]
)  # fmt: skip
CONFIGS = st.fixed_dictionaries(
    {
        "r": st.integers(1, 16),
        "lora_alpha": st.integers(1, 64),
        "use_rslora": st.booleans(),
        "rank_pattern": st.dictionaries(PATTERNS, st.integers(1, 16), max_size=4),
        "alpha_pattern": st.dictionaries(PATTERNS, st.integers(1, 64) | st.floats(0.5, 9), max_size=4),
    }
)


def parse(**keys: Any) -> LoraConfig:
    return LoraConfig.parse(json.dumps({**CONFIG, **keys}).encode())


@functools.cache
def peft() -> Any:
    return pytest.importorskip("peft")


def peft_answer(keys: dict[str, Any]) -> dict[str, tuple[int, float]]:
    """Rank and scaling that PEFT itself gives the modules of a tiny model with the names MODULES."""
    import torch

    root = torch.nn.Module()
    for name in MODULES:
        parent = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, torch.nn.Linear(2, 2))
    config = peft().LoraConfig(target_modules=["q_proj", "up_proj"], **keys)
    model = peft().inject_adapter_in_model(config, root)
    layers = {name: model.get_submodule(name) for name in MODULES}
    return {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@settings(max_examples=60, deadline=None)
@given(CONFIGS)
def test_ranks_and_scalings_are_those_of_peft(keys: dict[str, Any]) -> None:
    config = parse(**keys)
    ours = {name: (config.rank_of(name), config.scaling(name, config.rank_of(name))) for name in MODULES}
    assert ours == peft_answer(keys)


def test_every_key_that_peft_writes_has_been_thought_of(tmp_path: Any) -> None:
    peft().LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = LoraConfig.parse((tmp_path / "adapter_config.json").read_bytes())
    assert (config.r, config.lora_alpha, config.features) == (8, 8, ())


def test_the_fields_are_read() -> None:
    config = parse(
        use_rslora=True, use_dora=True, lora_bias=False, modules_to_save=["lm_head"], trainable_token_indices=[1, 5],
        layers_to_transform=3, revision="abc", target_modules=".*q_proj", fan_in_fan_out=True, init_lora_weights="eva",
    )  # fmt: skip
    assert config.features == ("dora", "modules_to_save", "rslora", "trainable_tokens")
    assert config.layers_to_transform == (3,)
    assert config.trainable_token_indices == (1, 5)
    assert config.target_modules == ".*q_proj"
    assert (config.base_model_name_or_path, config.revision) == ("tiny-base", "abc")


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)+b", r"(q)\1", "(?P<x>a)(?P=x)", "(q", "(a*){9}", "(?=a)a", "["])
def test_patterns_with_repeated_or_special_groups_are_refused(pattern: str) -> None:
    with pytest.raises(ConfigMalformed, match="pattern"):
        parse(rank_pattern={pattern: 2})


@pytest.mark.parametrize("pattern", ["a?" * 30 + "a" * 30, ".*.*.*.*.*x", "(a|a)" * 40 + "b", "[a.]*[a.]*[a.]*[a.]*x"])
def test_patterns_that_would_stall_the_matcher_are_refused_before_they_are_used(pattern: str) -> None:
    config = parse(rank_pattern={pattern: 2})
    with pytest.raises(ConfigMalformed, match="too long to match"):
        config.check_match_cost(["a" * 200])


def test_patterns_as_people_and_eva_write_them_are_cheap_enough() -> None:
    modules = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(126) for part in "qkvougd"]
    parse(rank_pattern=dict.fromkeys(modules, 4), alpha_pattern=dict.fromkeys(modules, 4)).check_match_cost(modules)
    parse(rank_pattern={r".*layers\.\d+\.self_attn\.(q|k|v|o)_proj": 4}).check_match_cost(modules)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"r": "8"}, "r is"), ({"r": True}, "r is"), ({"lora_alpha": "x"}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"), ({"bias": "some"}, "bias"), ({"target_modules": [1]}, "target_modules"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"), ({"rank_pattern": [1]}, "rank_pattern"),
        ({"layers_to_transform": [-1]}, "layers_to_transform"), ({"init_lora_weights": "magic"}, "init_lora_weights"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_or_range_are_named(keys: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigMalformed, match=complaint):
        parse(**keys)


def test_a_refused_key_is_told_with_advice_where_there_is_some() -> None:
    with pytest.raises(ConfigKeyRefused, match="task_type"):
        parse(auto_mapping={"base_model_class": "X", "parent_library": "os"})


@pytest.mark.parametrize(
    ("key", "site"),
    [
        ("model.layers.0.q.lora_A.weight", TensorSite("model.layers.0.q", "lora_A")),
        ("model.layers.0.q.lora_B.weight", TensorSite("model.layers.0.q", "lora_B")),
        ("model.layers.0.q.lora_B.bias", TensorSite("model.layers.0.q", "lora_bias", "bias")),
        ("model.layers.0.q.lora_magnitude_vector", TensorSite("model.layers.0.q", "magnitude")),
        ("model.embed_tokens.lora_embedding_A", TensorSite("model.embed_tokens", "embedding_A")),
        ("lm_head.base_layer.weight", TensorSite("lm_head", "base")),
        ("lm_head.weight", TensorSite("lm_head", "saved")),
        ("model.norm.bias", TensorSite("model.norm", "saved", "bias")),
        (
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
            TensorSite("model.embed_tokens", "trainable_tokens"),
        ),
    ],
)
def test_tensor_names(key: str, site: TensorSite) -> None:
    assert parse_tensor_name(f"base_model.model.{key}") == site


@pytest.mark.parametrize(
    "key",
    [
        "q.lora_A.weight",
        "base_model.model.q.lora_A.default.weight",
        "base_model.model..weight",
        "base_model.model.x",
        "base_model.model.a/b.weight",
        "base_model.model.lora_A.weight",
        "base_model.model.q.lora_E",
        "x" * 999,
    ],
)
def test_names_that_peft_does_not_write_are_refused(key: str) -> None:
    with pytest.raises(TensorUnknown):
        parse_tensor_name(key)
