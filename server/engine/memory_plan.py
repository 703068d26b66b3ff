"""Does everything fit, before anything is allocated: weights, KV pages, adapters and the room that a step works in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hub.byte_size import as_text
from server.config import EngineLimits
from server.engine.machine_memory import available_memory
from server.errors import BaseUnavailable
from server.model.base import BaseModel

log = logging.getLogger(__name__)

_RESERVE = 0.03  # of the budget, for what libraries take and what lies between tensors
_DRAWN_ROWS, _DRAWN_BYTES = 8, 48  # rows sorted at once, bytes a vocabulary entry takes meanwhile (`device_sampler`)
_FIXED = 64 << 20  # tables, and what no other number names


@dataclass(frozen=True)
class Widths:
    """A decoder's sizes, as far as a step's memory depends on them; `item` bytes an activation."""

    hidden: int
    inner: int  # of the MLP
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    largest_weight: int  # elements, of what is multiplied as one
    item: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device, by use."""

    budget: int
    weights: int
    pages: int
    adapters: int
    parts: int
    workspace: int

    @property
    def reserve(self) -> int:
        """Kept free."""
        return int(self.budget * _RESERVE)

    @property
    def uses(self) -> Mapping[str, int]:
        """By name, as people read them."""
        return {
            "weights": self.weights,
            "KV pages (--kv-memory)": self.pages,
            "adapters (--adapter-memory)": self.adapters,
            "adapters' other parts (--adapter-parts-memory)": self.parts,
            "workspace (--max-batch-tokens, --max-sequences)": self.workspace,
            "reserve": self.reserve,
        }

    @property
    def needed(self) -> int:
        """All uses together."""
        return sum(self.uses.values())

    @property
    def spare(self) -> int:
        """What nothing uses; negative where it does not fit."""
        return self.budget - self.needed

    def __str__(self) -> str:
        uses = ", ".join(f"{name} {as_text(size)}" for name, size in self.uses.items())
        return f"{as_text(self.needed)} of {as_text(self.budget)}: {uses}"

    def check(self) -> None:
        """Raise `BaseUnavailable`, with all numbers, where it does not fit."""
        if self.spare < 0:
            raise BaseUnavailable(f"the memory is too small by {as_text(-self.spare)}: {self}")


def plan(budget: int, weights: int, limits: EngineLimits, workspace: int) -> MemoryPlan:
    """How `budget` bytes are used by a base of `weights` bytes under these limits; checked by `MemoryPlan.check`."""
    return MemoryPlan(
        budget,
        weights,
        limits.kv_memory_bytes,
        limits.adapter_memory_bytes,
        limits.adapter_parts_memory_bytes,
        workspace,
    )


def workspace_bytes(widths: Widths, limits: EngineLimits, *, unpacks: bool) -> int:
    """What a step needs beside what stays, at its largest; `unpacks`: weights become dense for long prompts.

    An upper bound by what is alive at once: a layer's rows, the logits, a sampled row's sorting.
    """
    rows, sequences = limits.max_batch_tokens, min(limits.max_sequences, limits.max_batch_tokens)
    qkv = (widths.heads + 2 * widths.kv_heads) * widths.head_width
    layer = rows * (4 * widths.hidden + qkv + 2 * widths.heads * widths.head_width + 3 * widths.inner) * widths.item
    logits = sequences * widths.vocabulary * (2 * 4 + widths.item)
    drawing = min(_DRAWN_ROWS, sequences) * widths.vocabulary * _DRAWN_BYTES
    dense = widths.largest_weight * widths.item if unpacks else 0
    return _FIXED + layer + logits + drawing + dense


def widths_of(base: BaseModel) -> Widths:
    """The sizes of a loaded base."""
    config: Any = base.model.config.get_text_config()
    linears = [linear.in_features * linear.out_features for linear in base.linears().values()]
    return Widths(
        hidden=int(config.hidden_size),
        inner=int(getattr(config, "intermediate_size", 4 * config.hidden_size)),  # some have another word for it
        heads=int(config.num_attention_heads),
        kv_heads=base.kv_heads,
        head_width=base.head_width,
        vocabulary=base.vocabulary_size,
        largest_weight=3 * max(linears, default=0),  # up to three are joined
        item=base.dtype.itemsize,
    )


def fit(base: BaseModel, limits: EngineLimits, standing: int = 0) -> MemoryPlan | None:
    """The plan of a loaded base, before pages and adapters are allocated; raises `BaseUnavailable` where all that
    does not fit.

    `standing`: bytes of buffers that stay beside what a step allocates. The budget is what is free beside the weights
    on the GPU or, for a CPU, in the machine, or less where the limits say so; no plan where neither is known.
    """
    on_gpu = base.device.startswith("cuda")
    free: int | None
    if on_gpu:
        torch.cuda.empty_cache()  # what loading left
        weights = torch.cuda.memory_allocated(base.device)
        free = torch.cuda.mem_get_info(base.device)[0]
    else:
        weights = _weights(base.model)
        free = available_memory()
    budget = limits.device_memory_bytes
    if free is not None:
        budget = min(budget, free + weights) if budget else free + weights
    if not budget:
        return None
    workspace = workspace_bytes(widths_of(base), limits, unpacks=on_gpu and base.quantization == "nf4") + standing
    planned = plan(budget, weights, limits, workspace)
    log.info("memory: %s", planned)
    planned.check()
    return planned


def _weights(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
