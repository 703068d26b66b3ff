"""Engines for the tests of the GPU's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine


def build(base: Path, fetch: Any, *, quantization: str = "none", dtype: str = "float32", **limits: Any) -> Engine:
    """An engine on small memory, whose token budget cuts prompts of more than 16 tokens into chunks."""
    settings = {
        "max_sequences": 4,
        "max_batch_tokens": 16,
        "page_tokens": 8,
        "adapter_memory_bytes": 2 << 20,
        "kv_memory_bytes": 1 << 20,
        **limits,
    }
    model = ModelConfig(base=str(base), quantization=quantization, dtype=dtype, threads=1)  # type: ignore[arg-type]
    return Engine.build(model, EngineLimits(**settings), fetch)
