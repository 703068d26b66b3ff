"""What all tests share: bounded threads, files in memory, a tiny random base and its tokenizer, PEFT adapters on it."""

from __future__ import annotations

import os

# Before torch is imported anywhere: idle OpenMP threads must sleep, not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before anything is written: hubs, databases and buckets that fsync at every step lie in memory, where there is room
# and libraries may be loaded from it. TMPDIR names another place.
MEMORY = Path("/dev/shm")
if (
    "TMPDIR" not in os.environ
    and os.access(MEMORY, os.W_OK)
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    and shutil.disk_usage(MEMORY).free > 4 * 2**30
):
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

# Before Triton is imported anywhere: without a GPU, its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """Where kernels will be interpreted, nothing is interpreted for nothing."""
    if "triton.runtime.interpreter" in sys.modules:
        from tests.interpreter import spare

        spare()


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
    """A transformers directory: 2 Llama layers, hidden 64, GQA 4/2, 300 tokens, byte tokenizer, chat template."""
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


@pytest.fixture(scope="session")
def directory_fetch() -> Callable[[dict[str, Path]], Any]:
    """directory_fetch({digest: PEFT directory}) → what the engine takes as `fetch`, without a hub."""

    def build(directories: dict[str, Path]) -> Any:
        from server.adapters.weights import AdapterFiles

        def fetch(digest: str) -> AdapterFiles:
            directory = directories[digest]
            return AdapterFiles(
                digest=digest,
                config=(directory / "adapter_config.json").read_bytes(),
                weights=(directory / "adapter_model.safetensors").read_bytes(),
                base_name=None,
                base_fingerprint=None,
            )

        return fetch

    return build


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real SmolLM2-135M-Instruct (converted once into the user's cache)."""
    from server.model.builtin import smollm2_135m

    return smollm2_135m()


def write_random_adapter(base: Path, target: Path, *, rank: int, seed: int, b_std: float = 0.02) -> Path:
    """A PEFT directory over all seven linears, alpha 2r, A as PEFT draws it, B normal; no model is loaded for it."""
    import json

    import torch
    from safetensors.torch import save_file

    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    queries = config["num_attention_heads"] * config["head_dim"]
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module, (out_features, in_features) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{module}"
            bound = in_features**-0.5
            a = (torch.rand(rank, in_features, generator=generator) * 2 - 1) * bound
            tensors[f"{key}.lora_A.weight"] = a
            tensors[f"{key}.lora_B.weight"] = torch.randn(out_features, rank, generator=generator) * b_std
    target.mkdir(parents=True)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": ALL_LINEARS,
        "base_model_name_or_path": "smollm2-135m",
    }
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return target


REAL_RANKS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)


@pytest.fixture(scope="session")
def real_adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Twelve random adapters of ranks 4 to 64 on the real base, by the digest that tests call them."""
    root = tmp_path_factory.mktemp("real-adapters")
    return {f"r{rank}": write_random_adapter(smollm2, root / f"r{rank}", rank=rank, seed=rank) for rank in REAL_RANKS}
