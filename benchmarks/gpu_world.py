"""An engine over a random model made on the device from its shape, with as many adapters as are asked for."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_model import LLAMA_8B, TINY, Shape
from hub.base import BaseIdentity
from server.adapters.arena import row_bytes
from server.adapters.weights import AdapterFiles
from server.config import EngineLimits
from server.engine.engine import Completion, Engine
from server.engine.gpu import GpuSteps
from server.engine.observer import Unobserved
from server.engine.request import AdapterUse, Request, Stopping
from server.kernels.gpu import door
from server.kernels.gpu.selfcheck import random_weight
from server.model import attention
from server.model.base import BaseModel
from server.model.gpu_linear import become

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ids = count()


class Relaunched:
    """Stands in for CUDA graphs in Triton's interpreter: the step is launched again piece by piece."""

    def capture(self, run: Any) -> Any:
        return run


@contextlib.contextmanager
def gpu_or_pretended(bench: Bench) -> Iterator[None]:
    """Engines made inside take the GPU's way, also where its kernels are interpreted."""
    if bench.device == "cuda":
        yield
        return
    # Trying prompts compiles their kernels; interpreted ones have nothing to compile, and take long.
    with (
        patch.object(door, "load", lambda device, dtype: door.opened(device, dtype, Relaunched())),
        patch.object(GpuSteps, "first_prompts", lambda self: None),
    ):
        yield


@dataclass(frozen=True)
class Stepped:
    """One step of an engine."""

    ended: float  # by the monotonic clock
    seconds: float
    sequences: int
    adapters: int
    tokens: int


class Steps(Unobserved):
    """Remembers steps, and how long adapters took to reach the device."""

    def __init__(self) -> None:
        self.seen: list[Stepped] = []
        self.loads: list[tuple[float, float]] = []  # (ended, seconds)

    def step(self, *, seconds: float, sequences: int, adapters: int, tokens: int) -> None:
        self.seen.append(Stepped(time.monotonic(), seconds, sequences, adapters, tokens))

    def kinds(self) -> str:
        """How many steps of which (sequences, tokens), the commonest first."""
        counted = Counter((step.sequences, step.tokens) for step in self.seen)
        return ", ".join(f"{count} of {kind}" for kind, count in counted.most_common(6))

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        if tier == "device":
            self.loads.append((time.monotonic(), seconds))


class World:
    """The engine, its steps and its adapters: "0", "1", … of one rank over all linears.

    All of them share one file's numbers, but each has rows of its own in the arena: bytes, not values, are timed.
    """

    def __init__(self, bench: Bench, *, packed: bool, resident: int, rank: int = 16, **limits: Any) -> None:
        shape = TINY if bench.tiny else LLAMA_8B
        self.shape, self.rank = shape, rank
        dtype = torch.bfloat16
        self.base = random_base(shape, bench.device, packed=packed, dtype=dtype)
        shapes = {site: (m.out_features, m.in_features) for site, m in self.base.linears().items()}
        self.row_bytes = row_bytes(shapes, dtype)
        self._files = adapter_files(shapes, rank, dtype)
        self.steps = Steps()
        page = 2 * 2 * shape.layers * shape.kv_heads * shape.width * 16
        settings: dict[str, Any] = {
            "max_sequences": 4 if bench.tiny else 64,
            "max_batch_tokens": 64 if bench.tiny else 16384,
            "max_waiting": 100_000,
            "max_waiting_per_tenant": 100_000,
            "kv_memory_bytes": page * (64 if bench.tiny else 4096),
            "adapter_memory_bytes": self.row_bytes * rank * resident,
            "host_adapter_memory_bytes": (1 << 20) if bench.tiny else 24 << 30,
            **limits,
        }
        with gpu_or_pretended(bench):
            self.engine = Engine(self.base, EngineLimits(**settings), self.fetch, self.steps)
        self.engine.start()

    def fetch(self, digest: str) -> AdapterFiles:
        """Any adapter's files."""
        return replace(self._files, digest=digest)

    def requests(self, adapters: Sequence[str | None], prompt: int, new: int) -> list[Request]:
        """One request for every entry, None for the base."""
        return [
            Request(
                id=str(next(_ids)),
                prompt=tuple(torch.randint(4, self.shape.vocabulary, (prompt,)).tolist()),
                stopping=Stopping(max_new_tokens=new, ignore_eos=True),
                adapters=() if adapter is None else (AdapterUse(adapter, f"bench/{adapter}@1"),),
            )
            for adapter in adapters
        ]

    def run(self, adapters: Sequence[str | None], prompt: int, new: int) -> tuple[list[Completion], float]:
        """The answers, and the seconds that all of them took."""
        for digest in dict.fromkeys(a for a in adapters if a is not None):
            self.engine.adapters.load(digest, f"bench/{digest}@1")
        asked = self.requests(adapters, prompt, new)
        self.steps.seen.clear()
        started = time.perf_counter()
        answers = self.engine.generate(asked)
        taken = time.perf_counter() - started
        failed = next((answer.error for answer in answers if answer.error is not None), None)
        if failed is not None:
            raise failed
        return answers, taken

    def decode_seconds(self, rows: int) -> float:
        """The median time from the end of one of the last run's steps in which `rows` sequences got one token each to
        the end of the next: all that lies between two tokens of a sequence."""
        own = sorted(
            after.ended - before.ended
            for before, after in pairwise(self.steps.seen)
            if (before.sequences, before.tokens) == (after.sequences, after.tokens) == (rows, rows)
        )
        if not own:
            raise RuntimeError(f"no two steps in turn had {rows} rows of one token")
        return own[len(own) // 2]

    def weight_bytes(self) -> int:
        """What a decode step reads of the base at least."""
        linears = sum(
            m.packed.nbytes if hasattr(m, "packed") else m.weight.nbytes
            for m in (wrapped.base for wrapped in self.base.model.modules() if hasattr(wrapped, "base"))
        )
        return int(linears + self.base.model.get_output_embeddings().weight.nbytes)

    def step_bytes(self, rows: int, context: int, adapters: int) -> int:
        """What a decode step reads at least: weights, keys and values, distinct adapters."""
        shape = self.shape
        cache = 2 * 2 * rows * context * shape.kv_heads * shape.width * shape.layers
        return self.weight_bytes() + cache + adapters * self.rank * self.row_bytes

    def close(self) -> None:
        """Free the device's memory."""
        self.engine.close()
        del self.engine, self.base
        release()


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def random_base(shape: Shape, device: str, *, packed: bool, dtype: torch.dtype) -> BaseModel:
    """A Llama of `shape` with random weights, made on the device; no file is read."""
    attention.register()
    model = empty_llama(shape)
    if packed:
        from server.kernels.gpu.nf4 import Workspace

        workspace = Workspace(device)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
                become(module, random_weight(module.out_features, module.in_features, device), workspace, dtype)
    fill(model, device, dtype)
    model.set_attn_implementation(attention.ATTENTION_NAME)
    return BaseModel(
        identity=BaseIdentity(name=f"random {shape.name}", revision=None, fingerprint=None, quantization=None),
        model=model,
        tokenizer=tokenizer(shape.vocabulary),
        architecture=type(model).__name__,
        quantization="nf4" if packed else "none",
        dtype=dtype,
        device=device,
        context_tokens=int(model.config.max_position_embeddings),
        vocabulary_size=shape.vocabulary,
    )


def empty_llama(shape: Shape) -> Any:
    """transformers' model without memory for its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.width,
        max_position_embeddings=8192,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def fill(model: Any, device: str, dtype: torch.dtype) -> None:
    """Give a model from `empty_llama` memory and numbers: what has none yet becomes random, norms one."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            tensor = torch.ones(parameter.shape, dtype=dtype, device=device)
            if tensor.dim() > 1:
                tensor.normal_(std=parameter.shape[-1] ** -0.5)
            setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(device)
    model.requires_grad_(False).eval()


def tokenizer(vocabulary: int) -> Any:
    """One word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{i}": i for i in range(4, vocabulary)}
    backend = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def adapter_files(shapes: dict[str, tuple[int, int]], rank: int, dtype: torch.dtype) -> AdapterFiles:
    """A PEFT adapter over all linears, as the hub would hand it over."""
    from safetensors.torch import save

    tensors = {}
    for site, (out, width) in shapes.items():
        tensors[f"base_model.model.{site}.lora_A.weight"] = (torch.randn(rank, width) * width**-0.5).to(dtype)
        tensors[f"base_model.model.{site}.lora_B.weight"] = (torch.randn(out, rank) * 0.02).to(dtype)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(LINEARS),
    }
    return AdapterFiles("", json.dumps(config).encode(), save(tensors), None, None)
