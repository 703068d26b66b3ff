"""Whether this engine runs on a GPU, decided once; the only place that looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
