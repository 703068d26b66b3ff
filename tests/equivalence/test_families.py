"""Every model family we claim, as a tiny random model: our engine against transformers' generate(), in float32.

Each family is small enough to build in the test, and its initialization wide enough that a wrong window, cap or
rotation changes tokens.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from server.config import ModelConfig
from server.errors import TensorUnbound, UnsupportedAdapter, UnsupportedArchitecture
from server.model.base import load_base
from tests.conftest import write_byte_tokenizer
from tests.equivalence.reference import ask, assert_alike, assert_same, build, load, write_moved_adapter

LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = LLAMA_LINEARS[:4]
# Long enough to leave a window of 16 and to cross longrope's switch at 64 while decoding.
PROMPT_TOKENS = (1, 7, 40, 50, 64, 65, 90)


@dataclass(frozen=True)
class Family:
    """One architecture: its config class, what it needs beyond `SMALL`, and the linears a LoRA targets."""

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = LLAMA_LINEARS


SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "initializer_range": 0.2,
}
WINDOWS = {"sliding_window": 16, "num_hidden_layers": 4}
LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        "original_max_position_embeddings": 64,
    },
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    "qwen2": Family("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "mistral": Family("MistralConfig", {"sliding_window": 16, "head_dim": 24}),
    "gemma2": Family(
        "Gemma2Config",
        {
            **WINDOWS,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        {
            **WINDOWS,
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": Family("Phi3Config", {"sliding_window": 40}, FUSED),
    "phi3-longrope": Family("Phi3Config", LONGROPE, FUSED),
    "olmo2": Family("Olmo2Config", {"num_key_value_heads": 4}),
    "qwen3-moe": Family(
        "Qwen3MoeConfig", {**EXPERTS, "num_experts": 4, "head_dim": 16, "norm_topk_prob": True}, ATTENTION
    ),
    "qwen2-moe": Family(
        "Qwen2MoeConfig",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48},
        (*ATTENTION, "shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"),
    ),
    "mixtral": Family("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}, ATTENTION),
}


def write_family(directory: Path, family: Family) -> None:
    import transformers

    torch.manual_seed(random.randrange(2**31))
    config = getattr(transformers, family.config)(**{**SMALL, **family.settings})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero, where leaving one out shows nothing
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    write_byte_tokenizer(directory)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "native") for name in FAMILIES),
        *((name, "blocks") for name in ("llama", "mistral", "qwen3", "gemma3", "phi3-longrope", "olmo2")),
        *((name, "torch") for name in ("llama", "mistral", "qwen2", "gemma2", "phi3", "olmo2", "qwen2-moe")),
    ],
)
def test_a_family_equals_generate(
    name: str,
    way: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    make_adapter: Callable[..., Path],
    directory_fetch: Callable[[dict[str, Path]], Any],
) -> None:
    """Base rows and two adapters of different rank in one batch, prompts of very different lengths, in chunks.

    native: as it is served; blocks: longer prompts attend in torch's blocks, between native layers; torch: as where
    there is no C compiler.
    """
    if way == "blocks":
        monkeypatch.setattr("server.engine.computing.LISTED_TOKENS", 45)
    elif way == "torch":
        monkeypatch.setattr("server.engine.computing.native.load", lambda dtype: None)
        monkeypatch.setattr("server.model.packed.library", lambda: None)
    family = FAMILIES[name]
    base = tmp_path / "base"
    write_family(base, family)
    adapters = {
        kind: make_adapter(base, tmp_path / kind, seed=random.randrange(2**31), r=rank, target_modules=targets)
        for kind, rank, targets in (("all", 12, list(family.targets)), ("few", 4, list(family.targets[:2])))
    }
    models: dict[str | None, Any] = {None: load(base), **{kind: load(base, path) for kind, path in adapters.items()}}
    kinds = [None, "all", "few", None, "all", "few", "all"]
    random.shuffle(kinds)
    prompts = [[random.randrange(256) for _ in range(count)] for count in PROMPT_TOKENS]
    engine = build(base, directory_fetch(adapters))
    try:
        answers = engine.generate(
            [ask(prompt, *([kind] if kind else [])) for kind, prompt in zip(kinds, prompts, strict=True)]
        )
        engine.check_integrity()
    finally:
        engine.close()
    for kind, prompt, answer in zip(kinds, prompts, answers, strict=True):
        assert_same(answer, models[kind], prompt, kind)


# What differs between families for an adapter's parts beside its rank rows: scaled embeddings, soft-capped and tied
# heads, norms over heads, fused and shared linears.
PARTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["norm", "embed_tokens"], "target_modules": ["o_proj"]},
    "tokens": {"trainable_token_indices": [5, 80, 81, 299], "target_modules": ["o_proj"]},
    "embedding": {"target_modules": ["o_proj", "embed_tokens"]},
    "head": {"target_modules": ["o_proj", "lm_head"]},
}


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gemma3", "phi3-longrope", "olmo2", "qwen2-moe"])
def test_every_part_in_every_family(
    name: str, tmp_path: Path, directory_fetch: Callable[[dict[str, Path]], Any]
) -> None:
    family = FAMILIES[name]
    base = tmp_path / "base"
    write_family(base, family)
    adapters = {
        kind: write_moved_adapter(
            base, tmp_path / kind, **{"r": 4, "lora_alpha": 8, "target_modules": list(family.targets), **settings}
        )
        for kind, settings in PARTS.items()
    }
    prompts = {kind: [*random.choices(range(256), k=random.choice([3, 40, 70])), 5, 80] for kind in PARTS}
    engine = build(base, directory_fetch(adapters))
    try:
        answers = engine.generate([ask(prompt, kind) for kind, prompt in prompts.items()])
    finally:
        engine.close()
    for (kind, prompt), answer in zip(prompts.items(), answers, strict=True):
        assert_same(answer, load(base, adapters[kind]), prompt, kind)


def test_lora_on_experts_is_refused_by_name(
    tmp_path: Path, make_adapter: Callable[..., Path], directory_fetch: Callable[[dict[str, Path]], Any]
) -> None:
    base = tmp_path / "base"
    write_family(base, FAMILIES["mixtral"])
    adapters = {
        "listed": make_adapter(base, tmp_path / "listed", target_modules=list(ATTENTION)),
        "packed": make_adapter(
            base,
            tmp_path / "packed",
            target_modules=["q_proj"],
            target_parameters=["experts.down_proj"],
            lora_dropout=0.0,
        ),
    }
    weights = load_file(adapters["listed"] / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
    weights[f"{key}.lora_A.weight"], weights[f"{key}.lora_B.weight"] = torch.ones(8, 64), torch.ones(96, 8)
    save_file(weights, adapters["listed"] / "adapter_model.safetensors", metadata={"format": "pt"})
    engine = build(base, directory_fetch(adapters))
    try:
        listed, packed, plain = engine.generate([ask([1, 2], "listed"), ask([1, 2], "packed"), ask([1, 2])])
    finally:
        engine.close()
    assert isinstance(listed.error, TensorUnbound)
    assert "experts.0.w1" in str(listed.error)
    assert isinstance(packed.error, UnsupportedAdapter)
    assert "target_parameters" in str(packed.error)
    assert plain.error is None


@pytest.mark.parametrize(
    ("config", "settings", "named"),
    [
        ("FalconConfig", {"num_kv_heads": 2}, "FalconForCausalLM has its own attention"),
        ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 2}, "MptForCausalLM has its own attention"),
        ("BloomConfig", {"n_layer": 2, "n_head": 4}, "BloomForCausalLM has its own attention"),
        (
            "DeepseekV3Config",
            {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "first_k_dense_replace": 2},
            "kv_lora_rank",
        ),
    ],
)
def test_an_architecture_we_cannot_serve_is_refused(
    config: str, settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    write_family(tmp_path, Family(config, settings))
    with pytest.raises(UnsupportedArchitecture, match=named) as raised:
        load_base(ModelConfig(base=str(tmp_path), quantization="none", dtype="float32", threads=1))
    assert str(tmp_path) not in str(raised.value)


def test_a_long_neighbour_does_not_change_a_short_longrope_sequence(
    tmp_path: Path, directory_fetch: Callable[[dict[str, Path]], Any]
) -> None:
    write_family(tmp_path, FAMILIES["phi3-longrope"])
    short, long = [random.choices(range(256), k=count) for count in (20, 200)]
    engine = build(tmp_path, directory_fetch({}), max_batch_tokens=64)
    try:
        alone = engine.generate([ask(short)])[0]
        beside = engine.generate([ask(long), ask(short), ask(long)])[1]
    finally:
        engine.close()
    assert_alike(beside, alone)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning")
def test_a_replaced_router_is_refused_by_name(
    tmp_path: Path, make_adapter: Callable[..., Path], directory_fetch: Callable[[dict[str, Path]], Any]
) -> None:
    base = tmp_path / "base"
    write_family(base, FAMILIES["qwen3-moe"])
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["mlp.gate"])
    engine = build(base, directory_fetch({"router": adapter}))
    try:
        router, plain = engine.generate([ask([1, 2], "router"), ask([1, 2])])
    finally:
        engine.close()
    assert isinstance(router.error, UnsupportedAdapter)
    assert "mlp.gate" in str(router.error)
    assert plain.error is None
