"""The wrapped linear layer: the pristine base's output plus each row's own adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from server.adapters.arena import Arena
from server.kernels.cpu import LoraBlock, lora_add, lora_blocks
from server.kernels.native import Native
from server.kernels.native.plans import AffinePlan, DecodePlan, PrefillPlan, Segment, Sites

if TYPE_CHECKING:
    from server.kernels.gpu.lora import LoraSites

Between = Callable[[], None]
"""What may be run while a batch rests between two layers."""


class SiteGroup:
    """The arena matrices of linear layers that share their input, such as q, k and v."""

    def __init__(self, arena: Arena, names: Sequence[str]) -> None:
        self.a = [arena.a[name] for name in names]
        self.b = [arena.b[name] for name in names]
        self.native = Sites(self.a, self.b)

    @cached_property
    def triton(self) -> LoraSites:
        """The same for the GPU's kernels."""
        from server.kernels.gpu.lora import LoraSites

        return LoraSites(self.a, self.b)


@dataclass(frozen=True)
class _Plan:
    """Of one batch, and what it was made from."""

    segments: tuple[Segment, ...] = ()
    decodes: int = 0
    native: tuple[DecodePlan | None, PrefillPlan | None] = (None, None)
    blocks: Sequence[LoraBlock] = ()


class ActiveAdapters:
    """Which arena rows belong to which rows of the batch being run; one object shared by all wrapped layers."""

    def __init__(self, dtype: torch.dtype, kernels: Native | None) -> None:
        self._dtype = dtype
        self._native = kernels
        # Whether within the layers every row's adapters are rank rows and what `affine` says alone; else these call
        # their single modules, where parts hook in.
        self.plain = True
        self.affine: AffinePlan | None = None  # beside the rank rows, where plain
        self.between: Between | None = None  # called between layers, where plain
        self._plan = _Plan()

    def use(
        self, segments: tuple[Segment, ...], decodes: int, plain: bool = True, affine: AffinePlan | None = None
    ) -> None:
        """Plan for a batch whose first `decodes` rows are sequences with one new token each.

        Decode steps of the same sequences ask for the same plan again and again; it is made once.
        """
        self.plain, self.affine = plain, affine
        if (segments, decodes) == (self._plan.segments, self._plan.decodes):
            return
        if self._native is None:
            self._plan = _Plan(segments, decodes, blocks=lora_blocks(segments, decodes, self._dtype))
            return
        rows = [segment for segment in segments if segment[1] <= decodes]
        spans = [segment for segment in segments if segment[1] > decodes]
        native = (DecodePlan(rows) if rows else None, PrefillPlan(spans) if spans else None)
        self._plan = _Plan(segments, decodes, native)

    def use_blocks(self, blocks: Sequence[LoraBlock]) -> None:
        """A plan made elsewhere, of plain torch operations; only where there are no native kernels."""
        self._plan = replace(self._plan, blocks=blocks)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Another batch may be planned and run within; afterwards the one at rest goes on."""
        kept = (self.plain, self.affine, self.between, self._plan)
        self.between = None
        try:
            yield
        finally:
            self.plain, self.affine, self.between, self._plan = kept

    @property
    def native_plans(self) -> tuple[DecodePlan | None, PrefillPlan | None]:
        """What `use` planned, for the native kernels."""
        return self._plan.native

    def add(self, x: Tensor, group: SiteGroup, y: Tensor) -> None:
        """Add every row's deltas in place; x: [T, in], y: [T, out], for a group of one site."""
        if self._native is not None:
            if self._plan.native != (None, None):
                self._native.lora(x.contiguous(), group.native, y, *self._plan.native)
        elif self._plan.blocks:
            lora_add(y, x, group.a[0], group.b[0], self._plan.blocks)


class LoraLinear(nn.Module):
    """y = base(x) + sum over the row's adapters of w * (x A^T) B; x: [1, T, in] or [T, in], y alike."""

    def __init__(self, base: nn.Linear, group: SiteGroup, active: ActiveAdapters) -> None:
        super().__init__()
        self.base: nn.Module = base
        self.out_features = base.out_features
        self._group = group
        self._active = active

    def forward(self, x: Tensor) -> Tensor:
        """Base plus deltas; costs next to nothing more when no row has an adapter."""
        y: Tensor = self.base(x)
        # Rows come as [1, T, in] from most callers, as [T, in] from a mixture's shared expert.
        self._active.add(x.reshape(-1, x.shape[-1]), self._group, y.view(-1, y.shape[-1]))
        return y


def wrap_linears(model: nn.Module, arena: Arena, active: ActiveAdapters) -> None:
    """Replace every linear layer that has rows in the arena by a `LoraLinear` around it."""
    for site in arena.a:
        parent, _, name = site.rpartition(".")
        owner = model.get_submodule(parent)
        base = owner.get_submodule(name)
        if not isinstance(base, nn.Linear):
            raise AssertionError(f"{site} is not a linear layer")
        setattr(owner, name, LoraLinear(base, SiteGroup(arena, [site]), active))
