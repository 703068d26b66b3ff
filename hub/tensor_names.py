"""What the names of tensors in PEFT's adapter_model.safetensors mean."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Final, Literal

from hub.errors import TensorUnknown

Kind = Literal[
    "lora_A",  # [r, in]
    "lora_B",  # [out, r]
    "lora_bias",  # [out], added with the same scaling as B·A
    "magnitude",  # [out], DoRA
    "embedding_A",  # [r, vocabulary]
    "embedding_B",  # [hidden, r]
    "trainable_tokens",  # [tokens, hidden], replaces these rows of the embedding
    "base",  # a copy of one of the base's own parameters beside a LoRA
    "saved",  # a full parameter that replaces the base's
]
PREFIX: Final = "base_model.model."
MAX_KEY_CHARS: Final = 256 + len(PREFIX) + 64
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)+", re.ASCII)
_SUFFIXES: Final[tuple[tuple[str, Kind, str], ...]] = (
    (".lora_A.weight", "lora_A", "weight"),
    (".lora_B.weight", "lora_B", "weight"),
    (".lora_B.bias", "lora_bias", "bias"),
    (".lora_magnitude_vector", "magnitude", "weight"),
    (".lora_magnitude_vector.weight", "magnitude", "weight"),
    (".lora_embedding_A", "embedding_A", "weight"),
    (".lora_embedding_B", "embedding_B", "weight"),
    (".token_adapter.trainable_tokens_delta", "trainable_tokens", "weight"),
    (".base_layer.weight", "base", "weight"),
    (".base_layer.bias", "base", "bias"),
)


@dataclass(frozen=True)
class TensorSite:
    """Where in the base a tensor belongs and what it is there."""

    module: str  # "model.layers.0.self_attn.q_proj", as the base names it
    kind: Kind
    parameter: str = "weight"  # of `module`; for "saved" and "base" the one replaced or copied


@functools.lru_cache(maxsize=16384)  # the adapters of one base have the same few hundred names
def parse_tensor_name(key: str) -> TensorSite:
    """The site of the tensor that PEFT saved as `key`; raises TensorUnknown."""
    if len(key) > MAX_KEY_CHARS or not _KEY.fullmatch(key) or not key.startswith(PREFIX):
        raise TensorUnknown(f"the tensor {_shown(key)} is not named as PEFT names the tensors of a LoRA")
    path = key.removeprefix(PREFIX)
    for suffix, kind, parameter in _SUFFIXES:
        if path.endswith(suffix) and len(path) > len(suffix):
            return TensorSite(path.removesuffix(suffix), kind, parameter)
    module, _, parameter = path.rpartition(".")
    if not module or "lora_" in path or "base_layer" in path:
        raise TensorUnknown(f"the tensor {_shown(key)} is not named as PEFT names the tensors of a LoRA")
    return TensorSite(module.replace(".modules_to_save", ""), "saved", parameter)


def _shown(key: str) -> str:
    return ascii(key if len(key) <= 160 else key[:157] + "...")
