"""What llama.cpp must know of a base's shape, and what its tensors are called there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from server.errors import ExportUnsupported

# transformers' model_type → llama.cpp's architecture.
_NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# llama.cpp rotates neighbours (2i, 2i+1) in this architecture, transformers halves (i, i + d/2): rows are reordered.
_ROTATES_NEIGHBOURS = {"llama"}


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama family."""

    name: str  # llama.cpp's: "llama", "qwen2", "qwen3"
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int  # rows of the embedding
    context: int  # tokens
    epsilon: float  # of RMSNorm
    rope_base: float
    rope_linear: float  # positions are divided by it
    rope_factors: tuple[float, ...]  # inverse frequency i is divided by factor i; empty = by nothing
    tied: bool  # the output head is the embedding

    @classmethod
    def of(cls, directory: Path) -> Architecture:
        """That of the transformers model in `directory`; raises `ExportUnsupported` for what would come out wrong."""
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(str(directory))
        name = _NAMES.get(config.model_type)
        if name is None:
            raise ExportUnsupported(
                f"model type {config.model_type!r} has no GGUF form here; there are: {', '.join(_NAMES)}"
            )
        if config.hidden_act != "silu":
            raise ExportUnsupported(f"llama.cpp computes {name} with silu, this base uses {config.hidden_act}")
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True):
            raise ExportUnsupported(f"llama.cpp's {name} has no sliding window; this base has one of {window} tokens")
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        base, linear, factors = _rope(config, head_dim)
        return cls(
            name=name,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            vocabulary=config.vocab_size,
            context=config.max_position_embeddings,
            epsilon=config.rms_norm_eps,
            rope_base=base,
            rope_linear=linear,
            rope_factors=factors,
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def rotates_neighbours(self) -> bool:
        """Whether llama.cpp rotates channels (2i, 2i+1) together, not (i, i + head_dim/2)."""
        return self.name in _ROTATES_NEIGHBOURS

    def tensor_name(self, parameter: str) -> str | None:
        """llama.cpp's name of "model.layers.0.mlp.up_proj.weight"; None where it has none."""
        import gguf

        kind = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        names = gguf.get_tensor_name_map(kind, self.layers)
        found: str | None = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        return found

    def reordered(self, parameter: str, rows: Tensor) -> Tensor:
        """`rows` [out, …] of that parameter in llama.cpp's order: q's and k's are reordered, others are left alone.

        Within each head, halves become neighbours: row (h, half, i) moves to (h, i, half). A LoRA's B is a weight's
        rows as well, its A none.
        """
        if not self.rotates_neighbours:
            return rows
        for projection, heads in (("self_attn.q_proj.", self.heads), ("self_attn.k_proj.", self.kv_heads)):
            if projection in parameter:
                shaped = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
                return shaped.transpose(1, 2).reshape(rows.shape).contiguous()
        return rows


def _rope(config: Any, head_dim: int) -> tuple[float, float, tuple[float, ...]]:
    """(base, linear factor, factor of every frequency)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = config.rope_parameters
    base, kind = float(parameters["rope_theta"]), parameters.get("rope_type", "default")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportUnsupported("this base rotates only part of each head, which has no GGUF form here")
    if kind == "default":
        return base, 1.0, ()
    if kind == "linear":
        return base, float(parameters["factor"]), ()
    if kind == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        return base, 1.0, tuple((plain / scaled).tolist())
    raise ExportUnsupported(f"rotary scaling {kind!r} has no GGUF form here; there are: default, linear, llama3")
