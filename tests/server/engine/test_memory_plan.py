"""The plan of a device's memory: what is counted, when it is refused, and that this comes before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.memory_plan import Widths, plan, workspace_bytes
from server.errors import BaseUnavailable

MIB = 1 << 20
LLAMA_8B = Widths(
    hidden=4096,
    inner=14336,
    heads=32,
    kv_heads=8,
    head_width=128,
    vocabulary=128256,
    largest_weight=4096 * 28672,
    item=2,
)


def test_all_uses_count_and_the_rest_is_spare() -> None:
    limits = EngineLimits(kv_memory_bytes=300 * MIB, adapter_memory_bytes=200 * MIB, adapter_parts_memory_bytes=0)
    planned = plan(2000 * MIB, 1000 * MIB, limits, 100 * MIB)
    assert planned.needed == 1600 * MIB + planned.reserve
    assert planned.spare == 400 * MIB - planned.reserve
    planned.check()


def test_a_refusal_names_every_number_and_the_option_behind_it() -> None:
    limits = EngineLimits(
        kv_memory_bytes=700 * MIB, adapter_memory_bytes=200 * MIB, adapter_parts_memory_bytes=50 * MIB
    )
    planned = plan(1500 * MIB, 600 * MIB, limits, 100 * MIB)
    with pytest.raises(BaseUnavailable) as refused:
        planned.check()
    said = str(refused.value)
    for words in ("too small by 195.0 MiB", "of 1.5 GiB", "weights 600.0 MiB", "(--kv-memory) 700.0 MiB", "50.0 MiB"):
        assert words in said, said
    assert "--adapter-memory" in said
    assert "--max-batch-tokens" in said


def test_the_workspace_grows_with_what_it_is_for() -> None:
    small = EngineLimits(max_batch_tokens=512, max_sequences=8)
    long, wide = EngineLimits(max_batch_tokens=8192, max_sequences=8), EngineLimits(max_batch_tokens=512)
    base = workspace_bytes(LLAMA_8B, small, unpacks=False)
    assert workspace_bytes(LLAMA_8B, small, unpacks=True) - base == 2 * LLAMA_8B.largest_weight
    # A prompt's rows: at least their gate and up.
    assert workspace_bytes(LLAMA_8B, long, unpacks=False) - base > (8192 - 512) * 2 * 14336 * 2
    # 56 sequences more: their logits in float32.
    assert workspace_bytes(LLAMA_8B, wide, unpacks=False) - base >= 56 * 128256 * 4


def test_an_engine_that_does_not_fit_is_refused_with_numbers(tiny_base: Path) -> None:
    config = ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1)
    settings = {"kv_memory_bytes": 64 * MIB, "adapter_memory_bytes": 8 * MIB, "adapter_parts_memory_bytes": MIB}

    def nothing(digest: str) -> None:
        raise AssertionError(digest)

    with pytest.raises(BaseUnavailable, match=r"too small by .*--kv-memory\) 64\.0 MiB"):
        Engine.build(config, EngineLimits(device_memory_bytes=100 * MIB, **settings), nothing)  # type: ignore[arg-type]
    engine = Engine.build(config, EngineLimits(device_memory_bytes=400 * MIB, **settings), nothing)  # type: ignore[arg-type]
    assert engine.memory is not None
    assert engine.memory.spare > 0
    engine.close()


def test_on_a_cpu_the_machines_memory_is_the_budget(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More is not given out until it is used, and then the kernel ends the process."""
    config = ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1)
    monkeypatch.setattr("server.engine.memory_plan.available_memory", lambda: 900 * MIB)
    with pytest.raises(BaseUnavailable, match=r"too small by .* of 900\..*--kv-memory\) 1\.0 GiB"):
        Engine.build(config, EngineLimits(kv_memory_bytes=1024 * MIB), lambda digest: pytest.fail(digest))
