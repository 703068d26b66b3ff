"""A server that is up while a plan runs: it follows what is promoted and never sees what is not."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hub.hub import Hub
from server.adapters.directory import hub_fetch
from server.client import Client
from server.config import MIB, EngineLimits, ModelConfig
from tests.server.api.fakes import RunningServer
from tests.training.continual.scripted import FORGETS, THREE, ScriptedScorer, ScriptedTrainer
from training.continual.plan import ContinualPlan
from training.continual.run import Run
from training.continual.scoring import Cell
from training.continual.tasks import prepare_data


class Watching(ScriptedScorer):
    """Before each stage's scores are told, waits until callers have been answered a few times more."""

    def __init__(self, answered: Callable[[], int]) -> None:
        super().__init__(FORGETS)
        self.answered = answered
        self.pause = threading.Event()

    def scores(self, cells: Any) -> list[dict[str, float]]:
        if self.cells:  # from the second stage on somebody is asking
            wait_for(self.answered, self.answered() + 5, self.pause)
        found: list[Cell] = list(cells)
        return super().scores(found)


def wait_for(count: Callable[[], int], least: int, pause: threading.Event) -> None:
    for _ in range(2000):
        if count() >= least:
            return
        pause.wait(0.01)
    raise AssertionError(f"only {count()} answers")


@pytest.mark.timeout(120)
def test_requests_follow_promotions_and_never_fail(
    write_plan: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    """Three stages: two are promoted, the third forgets and is not."""
    from server.engine.engine import Engine

    plan = ContinualPlan.read(write_plan(THREE, gates={"max_drop": 0.05}, intruders=False))
    (tmp_path / "run").mkdir()
    seen: list[str] = []
    stop = threading.Event()
    with Hub.open(str(tmp_path / "hub")) as hub:
        engine = Engine.build(
            ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1),
            EngineLimits(kv_memory_bytes=32 * MIB, adapter_memory_bytes=4 * MIB),
            hub_fetch(hub),
        )
        server = RunningServer(engine, hub)
        server.serve()
        failures: list[BaseException] = []

        def ask() -> None:
            with Client(server.address) as client:
                while not stop.is_set():
                    if "prod" not in (hub.aliases("team/stream") if hub.versions("team/stream") else {}):
                        stop.wait(0.01)
                        continue
                    try:
                        answer = client.generate("Is it good?", "team/stream:prod", max_new_tokens=4)
                    except BaseException as error:
                        failures.append(error)
                        return
                    seen.extend(one.version for one in answer.adapters)

        trainer: Any = ScriptedTrainer(tiny_base)
        run = Run(
            plan, tmp_path / "run", prepare_data(plan, tmp_path / "run"), trainer, Watching(lambda: len(seen)), hub,
            Console(file=io.StringIO()),
        )  # fmt: skip
        caller = threading.Thread(target=ask)
        caller.start()
        try:
            record = run()
            wait_for(lambda: len(seen), len(seen) + 20, stop)
        finally:
            stop.set()
            caller.join()
            server.close()
    assert not failures
    assert [stage.promoted for stage in record.stages] == [True, True, False]
    changes = [version for index, version in enumerate(seen) if index == 0 or seen[index - 1] != version]
    assert changes == ["team/stream@1", "team/stream@2"]  # each once, in order, and never the refused one
