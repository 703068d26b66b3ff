"""The families whose decoder layers look like Llama's, and how each differs from it; names are transformers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Family:
    """How a family's layer differs from Llama's."""

    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    head_norms: bool = False  # q_norm and k_norm in the attention
    flat_norm: bool = False
    late_norm: bool = False


FAMILIES = {
    "Llama": Family(),
    "Mistral": Family(),
    "Qwen2": Family(),
    "Qwen3": Family(head_norms=True),
    "Phi3": Family(qkv=("qkv_proj",), gate_up=("gate_up_proj",)),
    "Olmo2": Family(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
        head_norms=True,
        flat_norm=True,
        late_norm=True,
    ),
}


def family_of(model: nn.Module) -> Family | None:
    """The model's family, or None."""
    return FAMILIES.get(type(model).__name__.removesuffix("ForCausalLM"))


def silu(mlp: Any) -> bool:
    """Whether a layer's MLP is gated by SiLU."""
    activation = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


def window_of(attention: Any) -> int | None:
    """How many tokens back an attention module looks; None: all."""
    # Qwen2 and 3 decide by layer, Mistral and Phi-3 have one window for all; Llama's config knows none.
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return None if window is None else int(window)
