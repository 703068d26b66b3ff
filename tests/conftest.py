"""What all tests share: threads bounded, a tiny random base with a byte tokenizer, PEFT adapters made on it."""

from __future__ import annotations

import os

# Before torch is imported anywhere: idle OpenMP threads must sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run GPU tests only where there is a GPU, and say so where there is none."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers directory: Llama, 2 layers, hidden 64, GQA 4/2, 300 tokens, byte tokenizer with a chat template."""
    directory = tmp_path_factory.mktemp("bases") / "tiny"
    write_tiny_llama(directory)
    write_byte_tokenizer(directory)
    return directory


def write_tiny_llama(directory: Path, seed: int = 0, **overrides: Any) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 300,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": 257,
            "initializer_range": 0.2,  # far from uniform, so that a wrong delta changes the answer
            "tie_word_embeddings": True,
            **overrides,
        }
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def write_byte_tokenizer(directory: Path) -> None:
    """Ids 0–255 are the bytes, then <s>, </s>, <|user|>, <|assistant|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(alphabet + specials)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        additional_special_tokens=specials[2:],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer.save_pretrained(directory)


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Path]:
    """make_adapter(base_directory, target, seed=…, **LoraConfig fields) → a PEFT directory with random weights."""

    def make(base: Path, target: Path, *, seed: int = 0, b_std: float = 0.05, **config: Any) -> Path:
        import peft
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEARS, "task_type": "CAUSAL_LM", **config}
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=b_std)
        adapted.save_pretrained(target)
        return target

    return make
