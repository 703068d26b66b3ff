"""Whether this engine runs on a GPU, decided once; the only place that looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from server.config import EngineLimits
from server.errors import BaseUnavailable, DeterminismUnavailable
from server.kernels.gpu import door
from server.model.base import BaseModel

if TYPE_CHECKING:
    from server.engine.gpu import GpuSteps


def open_gpu(base: BaseModel, limits: EngineLimits) -> GpuSteps | None:
    """The GPU's way of running steps, or None on a CPU.

    Raises `BaseUnavailable` for a GPU that cannot be used and `DeterminismUnavailable`.
    """
    try:
        kernels = door.load(base.device, base.dtype)
    except door.Unsuitable as error:
        raise BaseUnavailable(f"{base.device} cannot be used: {error}") from error
    if kernels is None:
        return None
    if limits.deterministic:
        raise DeterminismUnavailable("--deterministic is promised on CPUs only so far")
    from server.engine.gpu import GpuSteps  # needs Triton

    return GpuSteps(base, limits, kernels)


def make_current(device: str) -> None:
    """Make a GPU that is named by its number the calling thread's own: Triton launches, and events are recorded, on
    whichever that is, not on the one where the tensors lie."""
    if torch.device(device).type == "cuda" and torch.device(device).index is not None:
        torch.cuda.set_device(device)
