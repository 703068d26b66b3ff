"""The same on a real card, its kernels compiled and its steps in CUDA graphs."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from tests.equivalence.reference import ask, load
from tests.equivalence.test_families import FAMILIES, LLAMA_LINEARS, write_family

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2"])
def test_a_family_equals_generate(
    name: str, tmp_path: Path, make_adapter: Callable[..., Path], directory_fetch: Callable[[dict[str, Path]], Any]
) -> None:
    base = tmp_path / "base"
    write_family(base, FAMILIES[name])
    adapters = {
        kind: make_adapter(
            base, tmp_path / kind, seed=random.randrange(2**31), r=rank, target_modules=list(LLAMA_LINEARS)
        )
        for kind, rank in (("a", 12), ("b", 4))
    }
    kinds = ["a", None, "b", "a", "b"]
    prompts = [[random.randrange(256) for _ in range(count)] for count in (70, 3, 16, 17, 200)]
    config = ModelConfig(base=str(base), quantization="none", dtype="float32", device="cuda")
    limits = EngineLimits(max_sequences=8, max_batch_tokens=96, kv_memory_bytes=8 << 20, adapter_memory_bytes=8 << 20)
    engine = Engine.build(config, limits, directory_fetch(adapters))
    try:
        answers = engine.generate([ask(p, *([kind] if kind else [])) for kind, p in zip(kinds, prompts, strict=True)])
        engine.check_integrity()
    finally:
        engine.close()
    for kind, prompt, answer in zip(kinds, prompts, answers, strict=True):
        assert answer.error is None
        model = load(base, adapters[kind] if kind else None)
        ids = torch.tensor([[*prompt, *answer.token_ids]])
        # Each token is the best, or as good as the best in float32, after what came before it.
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert float((logits.amax(-1) - chosen).max()) < 1e-3
