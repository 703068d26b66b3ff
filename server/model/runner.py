"""One forward pass over a packed batch: no padding, own KV pages, adapters applied by the wrapped linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from server.model import longrope
from server.model.attention import AttentionPlan, PagedKv
from server.model.base import BaseModel


@dataclass(frozen=True)
class PackedBatch:
    """The rows of one step as tensors: decoding rows first, then the prompt spans."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    attention: AttentionPlan
    sample_rows: Tensor  # [S] int64: rows whose next token is wanted


class RunsPacked(Protocol):
    """What runs packed batches over KV pages."""

    kv: PagedKv

    def run(self, batch: PackedBatch) -> Tensor:
        """Write the batch's keys and values and return something [S, …] in float32 of its sampled rows."""


class Runner:
    """Runs packed batches through the base; owns the KV pages' memory."""

    def __init__(self, base: BaseModel, pages: int, page_tokens: int) -> None:
        self._model = base.model
        self.long_rope = longrope.install(base.model)
        self.kv = PagedKv(base.layers, base.kv_heads, base.head_width, pages, page_tokens, base.dtype, base.device)

    @torch.inference_mode()
    def run(self, batch: PackedBatch) -> Tensor:
        """Write the batch's keys and values and return the logits [S, vocabulary] in float32."""
        out = self._model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.sample_rows,
            paged=(self.kv, batch.attention),
        )
        logits: Tensor = out.logits[0].float()
        return logits
