"""What both ways of deterministic steps share: a step's tokens singly, who cannot be promised for, and the trial before
anything is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from server.adapters.parts import AdapterParts, PartSpan
from server.engine.scheduler import Share
from server.errors import DeterminismUnavailable
from server.model.base import BaseModel
from server.model.runner import RunsPacked

ROWS = 16  # of a fixed step, and places that the trial tries


@dataclass(frozen=True)
class Row:
    """One token to compute: what it is, where it stands, which pages, adapter rows and parts are its sequence's."""

    token_id: int
    position: int
    pages: Seq[int]
    adapter_rows: tuple[tuple[int, int, float], ...] = ()
    samples: bool = False
    parts: tuple[tuple[AdapterParts, float], ...] = ()


@dataclass(frozen=True)
class StepOfRows:
    """A step that was run: all its shares, and those whose next token is wanted, in the order of the logits."""

    shares: tuple[Share, ...]
    sampling: tuple[Share, ...]


def refuse_coupled(base: BaseModel) -> None:
    """Raise `DeterminismUnavailable` for models whose layers look at other rows by design, and for GPUs."""
    if not base.device.startswith("cpu"):
        raise DeterminismUnavailable("--deterministic is promised on CPUs only so far")
    text = base.model.config.get_text_config()
    experts = [name for name in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(text, name, None)]
    if experts:
        raise DeterminismUnavailable(f"{base.architecture} routes rows to experts together, {experts[0]} > 0")
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = {str(each.get("rope_type", "default")) for each in (rope, *rope.values()) if isinstance(each, dict)}
    if kinds & {"dynamic", "longrope"}:
        raise DeterminismUnavailable(f"{base.architecture} takes its rotary scale from the longest row of a batch")


def rows_of(share: Share) -> list[Row]:
    """A share's tokens, singly."""
    sequence, stop = share.sequence, share.sequence.computed + share.tokens
    return [
        Row(
            sequence.tokens[position],
            position,
            sequence.pages,
            sequence.adapter_rows,
            share.samples and position == stop - 1,
            sequence.parts,
        )
        for position in range(sequence.computed, stop)
    ]


def part_spans(placed: Iterable[tuple[int, Row]]) -> list[PartSpan]:
    """What the adapters of rows do beside their rank rows; (place in the batch, row) by rising place."""
    spans = []
    for (parts, _), run in groupby(enumerate(placed), key=lambda at: (at[1][1].parts, at[1][0] - at[0])):
        places = [place for _, (place, _) in run]
        spans += [PartSpan(places[0], places[-1] + 1, weight, each) for each, weight in parts]
    return spans


def check_rows(forward: Callable[[Seq[Row]], Tensor], base: BaseModel, runner: RunsPacked, page_tokens: int) -> None:
    """Compute tokens alone and at every place in random company; raises `DeterminismUnavailable` on any change.

    `forward` runs rows and gives the logits of those that sample. Overwrites the first KV pages: only before requests
    come.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.vocabulary_size, (ROWS + 1,), generator=generator).tolist()
    own = range(-(-len(ids) // page_tokens))
    strangers = len(own)
    if runner.kv.pages <= strangers:
        raise DeterminismUnavailable(f"--deterministic needs at least {strangers + 1} pages of KV memory")

    def company(count: int) -> list[Row]:
        drawn = torch.randint(base.vocabulary_size, (count,), generator=generator).tolist()
        return [Row(token, 0, [strangers]) for token in drawn]

    for position, token in enumerate(ids):
        row = Row(token, position, own, samples=True)
        alone = forward([row])
        place = position % ROWS
        crowd = forward([*company(place), row, *company(ROWS - place - 1)])
        if not torch.equal(alone, crowd):
            raise DeterminismUnavailable(
                f"on this machine a row's result depends on its neighbours ({base.architecture}, "
                f"{base.quantization}, {base.dtype}): --deterministic cannot be kept"
            )
    runner.kv.scrub(range(strangers + 1))
