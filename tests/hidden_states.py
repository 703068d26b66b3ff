"""What the engine's readings are compared with: transformers' hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def embed(model: Any, prompts: Sequence[Sequence[int]], layer: int) -> Tensor:
    """The prompts' embeddings [n, d] from a transformers model, one by one, nothing padded; `layer` counts from 0."""
    rows = []
    model.eval()
    with torch.inference_mode():
        for ids in prompts:
            states = model.base_model(
                input_ids=torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True
            ).hidden_states
            rows.append(states[layer][0].float().mean(dim=0))
    return torch.stack(rows)
