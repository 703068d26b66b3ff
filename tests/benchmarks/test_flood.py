"""The flood keeps the queue full however long it lasts, and leaves nothing behind."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks.fairness import flood
from benchmarks.population import Population, ask
from benchmarks.watching import Watch, answered
from benchmarks.workload import write_adapters
from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine


def test_a_flood_does_not_end_before_it_is_told_to(tiny_base: Path, tmp_path: Path) -> None:
    population = Population(write_adapters(tiny_base, tmp_path, 2), 2)
    limits = EngineLimits(max_sequences=4, kv_memory_bytes=4 << 20, adapter_memory_bytes=1 << 20)
    model = ModelConfig(base=str(tiny_base), quantization="none", dtype="float32", threads=1)
    watch = Watch()
    engine = Engine.build(model, limits, population.fetch, watch)
    engine.start()
    try:
        with flood(engine, population.use(0), waiting=10):
            deadline = time.monotonic() + 30
            while len(watch.first_tokens) < 40 and time.monotonic() < deadline:  # far more than were sent at first
                answered(engine, ask(engine, 1, [population.use(1)], 1))
            assert len(watch.first_tokens) >= 40
            assert engine.snapshot().waiting >= 5
        assert (engine.snapshot().running, engine.snapshot().waiting) == (0, 0)
        engine.check_integrity()
    finally:
        engine.close()
