"""A pretended GPU: tensors on the CPU, kernels in Triton's interpreter, captured steps on tapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from server.kernels.gpu import door
from tests.server.engine.gpu.tape import TapeGraphs


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[TapeGraphs]:
    """From here on an engine on the CPU believes in a GPU; the graphs it captures with."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, for tensors on the GPU")
    graphs = TapeGraphs()
    monkeypatch.setattr(door, "load", lambda device, dtype: door.opened(device, dtype, graphs))
    yield graphs


@pytest.fixture
def pretend_gpu_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, but every step is launched piece by piece."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, for tensors on the GPU")
    monkeypatch.setattr(door, "load", lambda device, dtype: door.opened(device, dtype, None))
