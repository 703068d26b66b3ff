"""Which arena rows belong to which rows of the batch, for the GPU's LoRA kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from server.adapters.linear import ActiveAdapters, SiteGroup
from server.kernels.gpu.door import GpuKernels
from server.kernels.gpu.lora import MOST_SPLITS, lora_add, lora_begin, scratch_elements
from server.kernels.gpu.lora_plan import DECODE_TOKENS, RANKS, LoraPlan
from server.kernels.native.plans import AffinePlan, Segment

PROMPT_TOKENS = 64
PIECES = 8  # pieces of 16 arena rows that every group has room for, in the mean: rank 128


class GpuAdapters(ActiveAdapters):
    """Plans in two buffers that never move: one for rows with one token each, one for prompts.

    A step that needs more room than they have gets a plan of its own; captured graphs know only the first buffer.
    """

    def __init__(self, gpu: GpuKernels, max_sequences: int, max_batch_tokens: int) -> None:
        super().__init__(gpu.dtype, None)
        prompts = max_sequences + -(-max_batch_tokens // PROMPT_TOKENS)
        self._decode = LoraPlan(gpu.device, tokens=DECODE_TOKENS, groups=max_sequences, pieces=PIECES * max_sequences)
        self._prompt = LoraPlan(gpu.device, tokens=PROMPT_TOKENS, groups=prompts, pieces=PIECES * prompts)
        self._planned: tuple[tuple[Segment, ...], int] | None = None
        self._plans: tuple[LoraPlan, ...] = ()
        self._h = torch.empty(0, dtype=torch.float32, device=gpu.device)

    def reserve(self, groups: Iterable[SiteGroup]) -> None:
        """Make room for what the kernels hand from shrink to expand, enough for any of these groups in turn."""
        plans = (self._decode, self._prompt)
        most = max((scratch_elements(plan, group.triton) for group in groups for plan in plans), default=0)
        self._h = torch.empty(most, dtype=torch.float32, device=self._h.device)

    def use(
        self, segments: tuple[Segment, ...], decodes: int, plain: bool = True, affine: AffinePlan | None = None
    ) -> None:
        """See `ActiveAdapters.use`."""
        self.plain = plain
        if (segments, decodes) == self._planned:
            return
        self._planned = None  # nothing, should the plans not get filled
        rows = [segment for segment in segments if segment[1] <= decodes]
        spans = [segment for segment in segments if segment[1] > decodes]
        plans = (_filled(self._decode, rows) if rows else None, _filled(self._prompt, spans) if spans else None)
        self._plans = tuple(plan for plan in plans if plan is not None)
        self._planned = (segments, decodes)

    @property
    def captured(self) -> bool:
        """Whether all that `use` planned lies in the buffer that captured graphs read."""
        return all(plan is self._decode for plan in self._plans)

    def begin(self, x: Tensor, group: SiteGroup) -> Callable[[Tensor], None]:
        """`add` in two halves, around the product of the same x: returns the second one, for that product."""
        if self._plans == (self._decode,):
            return lora_begin(x, group.triton, self._decode, self._h)
        return lambda y: self.add(x, group, y)

    def add(self, x: Tensor, group: SiteGroup, y: Tensor) -> None:
        """Add every row's deltas in place; x: [T, in], y: [T, out], the outputs of the group's sites side by side."""
        for plan in self._plans:
            own = plan is self._decode or plan is self._prompt
            lora_add(y, x, group.triton, plan, self._h if own else None)


def _filled(plan: LoraPlan, segments: Sequence[Segment]) -> LoraPlan:
    """`plan` with these segments in it, or a larger one where it has no room for them."""
    while True:
        try:
            plan.fill(segments)
        except ValueError:
            device, groups, pieces = plan.buffer.device, 2 * plan.groups, 2 * plan.pieces
            plan = LoraPlan(device, tokens=plan.tokens, groups=groups, pieces=pieces)
        else:
            return plan


def standing_bytes(max_sequences: int, max_batch_tokens: int) -> int:
    """The most that `reserve` takes: three sites an input, cut into as many parts as ever in decode steps."""
    prompts = max_sequences + -(-max_batch_tokens // PROMPT_TOKENS)
    return 4 * PIECES * RANKS * 3 * (max_sequences * MOST_SPLITS * DECODE_TOKENS + prompts * PROMPT_TOKENS)
