import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from hub.hub import Hub
from server.client import Client
from tests.server.api.fakes import FakeEngine, FakeHub, RunningServer


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def fake_hub() -> FakeHub:
    hub = FakeHub()
    for name in ("team/a", "team/b"):
        hub.push(name)
    hub.push("team/a")
    hub.tag("team/a", "prod", 1)
    return hub


@pytest.fixture
def server(engine: FakeEngine, fake_hub: FakeHub) -> Iterator[RunningServer]:
    running = RunningServer(engine, fake_hub)
    running.serve()
    yield running
    running.close()


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture
def pushed(tmp_path: Path) -> Callable[..., None]:
    """pushed(hub, full_name, seed=…) pushes a small LoRA directory made without torch or PEFT."""

    def push(hub: Hub, full_name: str, *, seed: int) -> None:
        directory = tmp_path / f"{full_name.replace('/', '-')}-{seed}"
        directory.mkdir()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "tiny",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
        }
        (directory / "adapter_config.json").write_text(json.dumps(config))
        chance = np.random.default_rng(seed)
        prefix = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{prefix}.lora_A.weight": chance.standard_normal((4, 16), dtype=np.float32),
            f"{prefix}.lora_B.weight": chance.standard_normal((16, 4), dtype=np.float32),
        }
        save_file(tensors, directory / "adapter_model.safetensors")
        hub.push(directory, full_name)

    return push
