"""What PEFT saves is taken unchanged, checked against its base, and comes back as what PEFT loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub.hub import Hub

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 16}, "alpha_pattern": {"q_proj": 3}},
    "modules_to_save": {"modules_to_save": ["norm"], "target_modules": ["q_proj"]},
    "lora_bias": {"lora_bias": True},
    "trainable_tokens": {"trainable_token_indices": [1, 7, 9], "target_modules": ["v_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "one_layer": {"target_modules": ["down_proj"], "layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "expression": {"target_modules": r".*\.(q|v)_proj"},
}
FEATURES = {
    "rslora": ("rslora",),
    "dora": ("dora",),
    "rank_pattern": ("alpha_pattern", "rank_pattern"),
    "modules_to_save": ("modules_to_save",),
    "lora_bias": ("lora_bias",),
    "trainable_tokens": ("trainable_tokens",),
}


@pytest.mark.filterwarnings(
    "ignore:.*lora_bias=True",
    "ignore:Adapter 'default'.* invalid shape",  # PEFT takes the bias of lora_B for a cut matrix
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model has `tie_word_embeddings=True`",
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_goes_in_and_comes_out(
    kind: str, hub: Hub, tmp_path: Path, tiny_base: Path, make_adapter: Callable[..., Path]
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    saved = make_adapter(tiny_base, tmp_path / "saved", **KINDS[kind])
    version = hub.push(saved, f"team/{kind}", base=str(tiny_base)).version
    assert version.manifest.lora.features == FEATURES.get(kind, ())
    assert version.manifest.lora.changes_nothing is False
    hub.pull(f"team/{kind}", tmp_path / "pulled")

    def weights(directory: Path) -> dict[str, Any]:
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), directory)
        return peft.get_peft_model_state_dict(model)

    before, after = weights(saved), weights(tmp_path / "pulled")
    assert before.keys() == after.keys()
    assert all(after[name].equal(tensor) for name, tensor in before.items())


def test_ranks_by_pattern_are_counted(
    hub: Hub, tmp_path: Path, tiny_base: Path, make_adapter: Callable[..., Path]
) -> None:
    saved = make_adapter(tiny_base, tmp_path / "saved", r=4, **KINDS["rank_pattern"])
    lora = hub.push(saved, "x").version.manifest.lora
    assert lora.ranks == {"2": 2, "4": 11, "16": 1}  # 2 layers of 7 modules
    assert (lora.max_rank, lora.modules) == (16, 14)
    assert lora.targets == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")


def test_an_untrained_adapter_is_known_to_do_nothing(
    hub: Hub, tmp_path: Path, tiny_base: Path, make_adapter: Callable[..., Path]
) -> None:
    result = hub.push(make_adapter(tiny_base, tmp_path / "saved", b_std=0.0), "x", base=str(tiny_base))
    assert result.warnings == ("the adapter changes nothing: its delta is zero everywhere (untrained?)",)
