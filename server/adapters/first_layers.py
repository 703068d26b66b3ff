"""The base cut off after some of its layers: what it makes of a prompt on the way, for a router.

The cut model is the base itself, module by module, but for the list of its layers and the norm after them; nothing is
loaded or copied. Hidden states are counted as transformers counts them: 0 is the embedding, n what n layers make of it,
and behind all layers comes the last norm.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from server.adapters.fused import FusedLayers
from server.errors import RouterUnavailable
from server.model.attention import PagedKv
from server.model.base import BaseModel
from server.model.runner import PackedBatch


class FirstLayers:
    """Runs packed batches through a base's first `layers` layers.

    Raises `RouterUnavailable` for a model whose layers are not where Llama's are, or are fewer.
    """

    def __init__(self, base: BaseModel, kv: PagedKv, layers: int) -> None:
        self.kv = kv
        self._decoder = _cut(base, layers)

    @torch.inference_mode()
    def run(self, batch: PackedBatch) -> Tensor:
        """Write the batch's keys and values in these layers; the states [S, hidden] of its sampled rows in float32."""
        out = self._decoder(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            paged=(self.kv, batch.attention),
        )
        states: Tensor = out.last_hidden_state[0, batch.sample_rows].float()
        return states


def _cut(base: BaseModel, layers: int) -> Any:
    whole: Any = base.model.base_model
    every, norm = getattr(whole, "layers", None), getattr(whole, "norm", None)
    if not isinstance(every, nn.ModuleList) or not isinstance(norm, nn.Module):
        raise RouterUnavailable(f"{base.architecture}: hidden states are read from models built like Llama only")
    if not 0 <= layers <= base.layers:
        raise RouterUnavailable(f"the base has {base.layers} layers: there are no hidden states after {layers}")
    if layers == base.layers:
        return whole
    cut = copy.copy(whole)
    cut._modules = dict(whole._modules)
    fused = every[0]
    cut.layers = nn.ModuleList([fused.first(layers)] if isinstance(fused, FusedLayers) else list(every)[:layers])
    cut.norm = nn.Identity()
    return cut
