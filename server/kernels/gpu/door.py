"""The one way in to the GPU's operations, opened once at start: on a CUDA device they are used, elsewhere there are
none."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from server.kernels.gpu.aside import Aside, SideStream, in_line
from server.kernels.gpu.graphs import CudaGraphs, Graphs
from server.kernels.gpu.interpreted import take_turns

if TYPE_CHECKING:
    from server.kernels.gpu.nf4 import Workspace

log = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)  # bfloat16 in the tensor cores


class Unsuitable(Exception):
    """There is a GPU, but these kernels cannot run on it; the text says what is missing."""


@dataclass(frozen=True)
class GpuKernels:
    """What an engine on one GPU works with."""

    device: str  # as torch names it
    dtype: torch.dtype
    workspace: Workspace  # of the stream that steps run on
    graphs: Graphs | None  # None: every step is launched piece by piece
    aside: Aside  # where adapters are copied


def load(device: str, dtype: torch.dtype) -> GpuKernels | None:
    """The kernels for `device`; None where it is no GPU. Raises `Unsuitable`."""
    if not device.startswith("cuda"):
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise Unsuitable(f"compute capability {capability[0]}.{capability[1]}, at least 8.0 is needed")
    try:
        _check(device, dtype)
        return opened(device, dtype, CudaGraphs(device), SideStream(device))
    except ImportError as error:
        raise Unsuitable(f"{error.name or 'triton'} is not installed: pip install 'loraplex[gpu]'") from error


def _check(device: str, dtype: torch.dtype) -> None:
    """Raises `Unsuitable` where a kernel does not do here what it means. Seconds the first time, which compiles.

    Where it may be one of those in CUDA C++, Triton's take their place, and are asked in turn.
    """
    from server.kernels.gpu import cuda, selfcheck

    started = time.monotonic()
    with torch.cuda.device(device) if device.startswith("cuda") else contextlib.nullcontext():
        wrong = [str(found) for found in selfcheck.findings(device, dtype, selfcheck.SMALL) if not found.right]
        if wrong and cuda.available():
            log.warning("kernels in CUDA C++ are left out, the slower ones in Triton serve: %s", "; ".join(wrong))
            cuda.refuse()
            wrong = [str(found) for found in selfcheck.findings(device, dtype, selfcheck.SMALL) if not found.right]
    if wrong:
        raise Unsuitable("kernels of ours are wrong on this card: " + "; ".join(wrong))
    log.info("the GPU's kernels agree with plain torch (%.1f s)", time.monotonic() - started)


def opened(device: str, dtype: torch.dtype, graphs: Graphs | None, aside: Aside = in_line) -> GpuKernels:
    """The kernels without a look at the device; on the CPU they need Triton's interpreter, and are for tests."""
    from server.kernels.gpu.nf4 import Workspace

    if device == "cpu":
        take_turns()
    return GpuKernels(device, dtype, Workspace(device), graphs, aside)
