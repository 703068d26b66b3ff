"""What an engine has of its device: the current one of its threads, and an end when it is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.open_gpu import make_current
from server.engine.request import Request, Stopping
from server.errors import EngineFailed

Make = Callable[[], Engine]


@pytest.fixture
def make(tiny_base: Path, directory_fetch: Callable[[dict[str, Path]], Any]) -> Make:
    config = ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1)
    limits = EngineLimits(adapter_memory_bytes=1 << 20, kv_memory_bytes=1 << 20, max_sequences=2)
    return lambda: Engine.build(config, limits, directory_fetch({}))


def error_of(engine: Engine) -> Exception | None:
    """Of a short answer."""
    return engine.generate([Request(id="a", prompt=(1, 2, 3), stopping=Stopping(max_new_tokens=2))])[0].error


def test_a_lost_device_ends_the_engine(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sent the request again would fail in the same way for ever, and health would stay SERVING."""

    def lost(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    engine = make()
    monkeypatch.setattr(engine._loop, "_choose", lost)
    failed = error_of(engine)
    assert isinstance(failed, EngineFailed) and "its server ends" in str(failed)
    assert engine.ended.wait(10)
    engine.close()


@pytest.mark.parametrize("kind", [torch.AcceleratorError, torch.OutOfMemoryError])
def test_a_device_without_memory_is_not_lost(
    kind: type[RuntimeError], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: Any = kind("CUDA error: out of memory")
    full.error_code = 2  # as torch sets it
    engine = make()

    def refuse(*_: Any) -> Any:
        raise full

    try:
        with monkeypatch.context() as patch:
            patch.setattr(engine._loop, "_choose", refuse)
            assert "may be sent again" in str(error_of(engine))
        assert error_of(engine) is None
    finally:
        engine.close()


def test_the_engines_thread_has_the_engines_device(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches, and events are recorded, on a thread's current device, which begins as cuda:0."""
    made: list[tuple[str, str]] = []

    def note(device: str) -> None:
        made.append((threading.current_thread().name, device))

    monkeypatch.setattr("server.engine.engine.make_current", note)
    engine = make()
    assert error_of(engine) is None
    engine.close()
    assert made == [(threading.current_thread().name, "cpu"), ("loraplex-engine", "cpu")]


def test_a_numbered_gpu_becomes_the_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cpu", "cuda", "cuda:1"):
        make_current(device)
    assert chosen == ["cuda:1"]
