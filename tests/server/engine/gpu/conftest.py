"""A pretended GPU: tensors on the CPU, kernels in Triton's interpreter, captured steps on tapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from server.engine.captured import CapturedSteps
from server.engine.gpu import GpuSteps
from server.kernels.gpu import door
from tests.server.engine.gpu.tape import TapeGraphs


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[TapeGraphs]:
    """From here on an engine on the CPU believes in a GPU; the graphs it captures with, when a step first comes."""
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled here, for tensors on the GPU")
    graphs = TapeGraphs()
    monkeypatch.setattr(door, "load", lambda device, dtype: door.opened(device, dtype, graphs))
    # Capturing all of them at start, and trying prompts, takes the interpreter too long for every test.
    monkeypatch.setattr(CapturedSteps, "capture_all", lambda self, adapters: None)
    monkeypatch.setattr(GpuSteps, "first_prompts", lambda self: None)
    yield graphs
