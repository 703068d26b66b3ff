"""A base with every parameter an adapter can change, and PEFT adapters that change all they may."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def biased_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_base`, smaller, with biases in its attention; embedding and head are tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("bases") / "biased"
    shutil.copytree(tiny_base, directory, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tiny_base / "tokenizer_config.json", directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_bias=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def gpt2_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers keep their weights [in, out] (transformers' Conv1D)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("bases") / "gpt2"
    shutil.copytree(tiny_base, directory, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
    shutil.copy(tiny_base / "tokenizer_config.json", directory)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=512, n_embd=32, n_layer=2, n_head=4, bos_token_id=256, eos_token_id=257
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


@pytest.fixture
def trained(biased_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """`trained("name", r=4, …)`: a PEFT directory, written by PEFT, with every trainable parameter moved at random."""

    def make(name: str, base_directory: Path = biased_base, **settings: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
        base = AutoModelForCausalLM.from_pretrained(base_directory)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
        torch.manual_seed(sum(name.encode()))
        for parameter in model.parameters():
            if parameter.requires_grad:
                # Moved, not replaced: DoRA's magnitudes and trained copies keep their size.
                parameter.data += 0.2 * torch.randn_like(parameter)
        directory = tmp_path / name
        model.save_pretrained(directory, save_embedding_layers=False)
        return directory

    return make
