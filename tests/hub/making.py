"""Makes small adapters and bases out of plain bytes, sound or broken, without torch."""

from __future__ import annotations

import json
import shutil
import struct
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from hub.hub import Hub
from hub.parsing import parse_directory
from hub.publishing import kept
from hub.refs import AdapterRef
from hub.versions import PushResult

HIDDEN, KEYS, LAYERS, VOCABULARY = 16, 8, 2, 32

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "tiny-base",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
}
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # name → dtype, shape, raw bytes


def f32(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    values = np.asarray(array, dtype="<f4")
    return "F32", values.shape, values.tobytes()


def bf16(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    values = np.asarray(array, dtype="<f4")
    return "BF16", values.shape, (values.view("<u4") >> 16).astype("<u2").tobytes()


def f16(array: Any) -> tuple[str, tuple[int, ...], bytes]:
    values = np.asarray(array, dtype="<f2")
    return "F16", values.shape, values.tobytes()


def key(module: str, suffix: str, layer: int = 0) -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.{module}.{suffix}"


def lora_tensors(*, rank: int = 4, seed: int = 0, scale: float = 0.1) -> Tensors:
    """A LoRA on q_proj and v_proj of every layer."""
    random = np.random.default_rng(seed)
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for module, out in (("q_proj", HIDDEN), ("v_proj", KEYS)):
            tensors[key(module, "lora_A.weight", layer)] = f32(random.normal(size=(rank, HIDDEN)) * scale)
            tensors[key(module, "lora_B.weight", layer)] = f32(random.normal(size=(out, rank)) * scale)
    return tensors


def safetensors(tensors: Tensors, *, metadata: dict[str, str] | None = None) -> bytes:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def write_adapter(
    directory: Path,
    *,
    config: dict[str, Any] | None = None,
    tensors: Tensors | None = None,
    weights: bytes | None = None,
) -> Path:
    """A directory like PEFT's; `config` is laid over CONFIG, `weights` replaces the whole weights file."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    body = weights if weights is not None else safetensors(lora_tensors() if tensors is None else tensors)
    (directory / "adapter_model.safetensors").write_bytes(body)
    return directory


def push_kept(hub: Hub, source: Path, ref: str) -> PushResult:
    """Push a copy of `source` as the shared server does: its files are the server's own, and become the blobs."""
    copy = source.with_name(f"kept-{uuid.uuid4().hex}")
    shutil.copytree(source, copy)
    try:
        return hub.publish(parse_directory(copy), AdapterRef.parse(ref), located=None, stored=kept)
    finally:
        shutil.rmtree(copy)


def write_base(directory: Path, *, hidden: int = HIDDEN, seed: int = 0) -> Path:
    """A Llama-like base with the modules that `lora_tensors` targets."""
    random = np.random.default_rng(seed)
    tensors: Tensors = {"model.embed_tokens.weight": f32(random.normal(size=(VOCABULARY, hidden)))}
    for layer in range(LAYERS):
        for module, out in (("q_proj", hidden), ("k_proj", KEYS), ("v_proj", KEYS), ("o_proj", hidden)):
            tensors[f"model.layers.{layer}.self_attn.{module}.weight"] = f32(random.normal(size=(out, hidden)))
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": hidden}))
    (directory / "model.safetensors").write_bytes(safetensors(tensors))
    return directory
