"""The plans of a GPU's adapters: which rows of the batch have whose rows of the arena, in buffers that stay."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from server.adapters.gpu_active import GpuAdapters
from server.kernels.gpu import door
from server.kernels.gpu.lora_plan import LoraPlan

FIRST, SECOND = ((0, 1, 0, 8, 1.0),), ((0, 1, 8, 16, 1.0),)


@pytest.mark.parametrize("decodes", [0, 1])
def test_a_plan_that_could_not_be_filled_is_filled_the_next_time(decodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next batch with the same rows would run with the adapter of the one before."""
    active = GpuAdapters(door.opened("cpu", torch.float32, None), max_sequences=2, max_batch_tokens=16)
    active.use(FIRST, decodes)

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(LoraPlan, "fill", fail)
        with pytest.raises(RuntimeError):
            active.use(SECOND, decodes)
    filled: list[object] = []
    fill = LoraPlan.fill
    monkeypatch.setattr(LoraPlan, "fill", lambda self, segments: (filled.append(tuple(segments)), fill(self, segments)))
    active.use(SECOND, decodes)
    active.use(SECOND, decodes)
    assert filled == [SECOND]
    active.use(FIRST, decodes)
    assert filled == [SECOND, FIRST]
