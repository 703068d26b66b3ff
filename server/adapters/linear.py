"""The wrapped linear layer: the pristine base's output plus each row's own adapters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from server.adapters.arena import Arena
from server.kernels.cpu import LoraBlock, lora_add


class ActiveAdapters:
    """Which arena rows belong to which tokens of the batch being run; one object shared by all wrapped layers."""

    def __init__(self) -> None:
        self.blocks: Sequence[LoraBlock] = ()


class LoraLinear(nn.Module):
    """y = base(x) + sum over the token's adapters of w * (x A^T) B; x: [1, T, in] or [T, in], y alike."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, active: ActiveAdapters) -> None:
        super().__init__()
        self.base = base
        self.a = a
        self.b = b
        self._active = active

    def forward(self, x: Tensor) -> Tensor:
        """Base plus deltas; costs nothing more when no row has an adapter."""
        y: Tensor = self.base(x)
        if self._active.blocks:
            # Rows come as [1, T, in] from most callers, as [T, in] from a mixture's shared expert.
            lora_add(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), self.a, self.b, self._active.blocks)
        return y


def wrap_linears(model: nn.Module, arena: Arena, active: ActiveAdapters) -> None:
    """Replace every linear layer that has rows in the arena by a `LoraLinear` around it."""
    for site in arena.a:
        parent, _, name = site.rpartition(".")
        owner = model.get_submodule(parent)
        base = owner.get_submodule(name)
        if not isinstance(base, nn.Linear):
            raise AssertionError(f"{site} is not a linear layer")
        setattr(owner, name, LoraLinear(base, arena.a[site], arena.b[site], active))
