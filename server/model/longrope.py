"""longrope decided per sequence, so that a neighbour's length changes nobody's answer.

A longrope model has two sets of frequencies: one for sequences of up to `switch` tokens, one for longer ones.
transformers picks one set for everything in a call, by the largest position in it. In a packed batch that would be
the longest neighbour's, so each row carries its own sequence's choice here. A sequence that grows past the switch is
computed anew from its first token, as transformers' generate() does: its cached keys carry the short rotation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from server.errors import UnsupportedArchitecture


class LongRope(nn.Module):
    """Cosines and sines for packed rows; takes the place of transformers' `rotary_emb`."""

    def __init__(self, short: Tensor, long: Tensor, scaling: float, switch: int) -> None:
        super().__init__()
        self.switch = switch  # tokens; a sequence with more uses the long frequencies
        self._short = short.float()  # [D / 2]
        self._long = long.float()  # [D / 2]
        self._scaling = scaling
        self._rows: Tensor | None = None

    def select(self, lengths: Iterable[tuple[int, int]], device: str) -> None:
        """Say for the next batch, in row order, (rows of a sequence, tokens the sequence has in all)."""
        rows = [length > self.switch for count, length in lengths for _ in range(count)]
        self._rows = torch.tensor(rows, device=device)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x: [1, T, hidden], for its dtype; position_ids: [1, T] → cos, sin [1, T, D]."""
        if self._rows is None or self._rows.shape[0] != position_ids.shape[-1]:
            raise AssertionError("longrope was not told whose rows these are")
        frequencies = torch.where(self._rows[:, None], self._long.to(x.device), self._short.to(x.device))
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self._scaling).to(x.dtype), (angles.sin() * self._scaling).to(x.dtype)


def install(model: nn.Module) -> LongRope | None:
    """Replace a longrope model's rotary module by `LongRope` and return it; None for every other model.

    Raises `UnsupportedArchitecture` where only some kinds of layer use longrope.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name, module in list(model.named_modules()):
        kind: Any = getattr(module, "rope_type", None)
        if isinstance(kind, dict) and "longrope" in kind.values():
            raise UnsupportedArchitecture("longrope on only some kinds of layer is not served")
        if kind != "longrope":
            continue
        config: Any = module.config
        switch = int(config.rope_parameters["original_max_position_embeddings"])
        compute = ROPE_INIT_FUNCTIONS["longrope"]
        short, scaling = compute(config, torch.device("cpu"), seq_len=switch)
        long, _ = compute(config, torch.device("cpu"), seq_len=switch + 1)
        rope = LongRope(short, long, scaling, switch)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, rope)
        return rope
    return None
