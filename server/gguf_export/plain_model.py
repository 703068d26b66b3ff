"""A GGUF file computed in plain torch, as llama.cpp defines it: what proves that a file says what it should.

Shares no code with transformers: names, row order and rotation are llama.cpp's. Slow (no cache), float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from server.gguf_export.architecture import Architecture


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a GGUF file in float32, shaped as in torch: [out, in]."""
    import gguf

    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(tensor.data.copy())
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:  # bytes
            values = values.view(torch.bfloat16)
        tensors[tensor.name] = values.float()
    return tensors


def read_alpha(path: Path) -> float:
    """The `adapter.lora.alpha` of a GGUF LoRA."""
    import gguf

    reader: Any = gguf.GGUFReader(path)
    return float(reader.fields["adapter.lora.alpha"].contents())


def read_architecture(path: Path) -> Architecture:
    """The shape of a GGUF model, from its metadata alone."""
    import gguf

    reader: Any = gguf.GGUFReader(path)
    name = str(reader.fields["general.architecture"].contents())

    def value(key: str, default: float | None = None) -> Any:
        field = reader.fields.get(f"{name}.{key}")
        return default if field is None and default is not None else reader.fields[f"{name}.{key}"].contents()

    names = {tensor.name for tensor in reader.tensors}
    return Architecture(
        name=name,
        layers=value("block_count"),
        hidden=value("embedding_length"),
        inner=value("feed_forward_length"),
        heads=value("attention.head_count"),
        kv_heads=value("attention.head_count_kv"),
        head_dim=value("attention.key_length"),
        vocabulary=value("vocab_size"),
        context=value("context_length"),
        epsilon=value("attention.layer_norm_rms_epsilon"),
        rope_base=value("rope.freq_base"),
        rope_linear=value("rope.scaling.factor", 1.0),
        rope_factors=(),  # a tensor in the file
        tied="output.weight" not in names,
    )


@dataclass(frozen=True)
class PlainModel:
    """A decoder of the Llama family over llama.cpp's tensors, with a LoRA beside them or without."""

    architecture: Architecture
    tensors: Mapping[str, Tensor]
    lora: Mapping[str, Tensor] = field(default_factory=dict)  # "<tensor>.lora_a" [r, in], ".lora_b" [out, r]
    alpha: float = 0.0

    def logits(self, ids: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] of the token ids [tokens]."""
        hidden = self.tensors["token_embd.weight"][ids]
        for layer in range(self.architecture.layers):
            block = f"blk.{layer}"
            hidden = hidden + self._attention(block, self._norm(f"{block}.attn_norm", hidden))
            x = self._norm(f"{block}.ffn_norm", hidden)
            gated = functional.silu(self._linear(f"{block}.ffn_gate", x)) * self._linear(f"{block}.ffn_up", x)
            hidden = hidden + self._linear(f"{block}.ffn_down", gated)
        hidden = self._norm("output_norm", hidden)
        return self._linear("output" if "output.weight" in self.tensors else "token_embd", hidden)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        y = functional.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))
        a = self.lora.get(f"{name}.weight.lora_a")
        if a is not None:
            y = y + (x @ a.T @ self.lora[f"{name}.weight.lora_b"].T) * (self.alpha / a.shape[0])
        return y

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return self.tensors[f"{name}.weight"] * x * torch.rsqrt(x.pow(2).mean(-1, True) + self.architecture.epsilon)

    def _attention(self, block: str, x: Tensor) -> Tensor:
        shape = self.architecture
        tokens = x.shape[0]
        q, k, v = (
            self._linear(f"{block}.attn_{part}", x).view(tokens, heads, shape.head_dim)
            for part, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads))
        )
        if f"{block}.attn_q_norm.weight" in self.tensors:
            q, k = self._norm(f"{block}.attn_q_norm", q), self._norm(f"{block}.attn_k_norm", k)
        q, k = self._rotated(q), self._rotated(k)
        groups = shape.heads // shape.kv_heads
        k, v = (each.repeat_interleave(groups, 1) for each in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / shape.head_dim**0.5
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, v).reshape(tokens, -1)
        return self._linear(f"{block}.attn_output", mixed)

    def _rotated(self, x: Tensor) -> Tensor:
        """Each pair of channels turned by position · frequency; which channels pair up is the architecture's."""
        tokens, heads, width = x.shape
        frequencies = self.architecture.rope_base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
        if "rope_freqs.weight" in self.tensors:
            frequencies = frequencies / self.tensors["rope_freqs.weight"]
        positions = torch.arange(tokens, dtype=torch.float32) / self.architecture.rope_linear
        angles = (positions[:, None] * frequencies)[:, None]  # [tokens, 1, width/2]
        neighbours = self.architecture.rotates_neighbours
        pairs = x.view(tokens, heads, -1, 2) if neighbours else x.view(tokens, heads, 2, -1).transpose(2, 3)
        first, second = pairs.unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        turned = (first * cos - second * sin, first * sin + second * cos)
        return torch.stack(turned, -1).flatten(2) if neighbours else torch.cat(turned, -1)
