"""What a flood on one adapter does to another's time to first token.

A modest caller sends one request after the other to adapter 1 and waits for each. In turn: alone; beside a flood on
adapter 0 that keeps hundreds of requests waiting. Both rounds run on one engine, prefix cache off, so that every
prompt is computed. Printed are seconds and steps to the first token: steps say what the scheduler does, seconds also
what it costs that the flood makes every step fuller (a larger batch takes longer, with any scheduler).

    python -m benchmarks.fairness [--base DIRECTORY] [--flood 200] [--requests 20] [--new 32]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from benchmarks.workload import prompt, write_adapters
from server.adapters.weights import AdapterFiles
from server.config import EngineLimits, ModelConfig
from server.engine.engine import Engine
from server.engine.observer import Unobserved
from server.engine.outbox import BlockingOutbox, Outbox
from server.engine.request import AdapterUse, Request, Stopping


class FirstTokens(Unobserved):
    """Steps and seconds to the first token, by request."""

    def __init__(self) -> None:
        self.steps = 0
        self.step_seconds: list[float] = []
        self.seconds: dict[str, float] = {}
        self.at_step: dict[str, int] = {}

    def step(self, *, seconds: float, sequences: int, adapters: int, tokens: int) -> None:
        self.steps += 1
        self.step_seconds.append(seconds)

    def first_token(self, request: Request, seconds: float) -> None:
        self.seconds[request.id] = seconds
        self.at_step[request.id] = self.steps + 1


def p99(values: Sequence[float]) -> float:
    """The nearest-rank 99th percentile: with fewer than 100 values, the largest."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a model directory; default: the built-in one")
    parser.add_argument("--flood", type=int, default=200)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--sequences", type=int, default=16, help="sequences in one step")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.base is None:
        from server.model.builtin import smollm2_135m

        base = smollm2_135m()
    else:
        base = Path(options.base)
    with tempfile.TemporaryDirectory() as scratch:
        directories = write_adapters(base, Path(scratch), 2)

        def fetch(digest: str) -> AdapterFiles:
            directory = directories[int(digest)]
            config = (directory / "adapter_config.json").read_bytes()
            return AdapterFiles(digest, config, (directory / "adapter_model.safetensors").read_bytes(), None, None)

        seen = FirstTokens()
        limits = EngineLimits(prefix_cache=False, max_sequences=options.sequences, max_waiting_per_tenant=1024)
        model = ModelConfig(base=str(base), quantization="none", threads=options.threads)
        engine = Engine.build(model, limits, fetch, seen)

        def ask(adapter: int, number: int) -> Request:
            return Request(
                id=uuid.uuid4().hex,
                prompt=tuple(engine.text.encode(prompt(number))),
                stopping=Stopping(max_new_tokens=options.new, ignore_eos=True),
                adapters=(AdapterUse(str(adapter), f"bench/adapter-{adapter}@1"),),
            )

        engine.generate([ask(0, 0), ask(1, 1)])  # both on the device, everything warm
        print(f"{'modest caller':16} {'p50 s':>8} {'p99 s':>8} {'p99 steps':>10} {'step ms':>8}")
        rounds = {}
        for name, flood in (("alone", 0), ("beside a flood", options.flood)):
            for number in range(flood):
                engine.submit(ask(0, number), Outbox(lambda: None))
            time.sleep(1.0 if flood else 0.0)
            seconds, steps, first = [], [], len(seen.step_seconds)
            for number in range(options.requests):
                request, outbox = ask(1, number), BlockingOutbox()
                before = seen.steps
                engine.submit(request, outbox)
                for delta in outbox:
                    if delta.error is not None:
                        raise delta.error
                seconds.append(seen.seconds[request.id])
                steps.append(seen.at_step[request.id] - before)
            if flood and not engine.snapshot().waiting:
                raise SystemExit("the flood ended before the measurement did: raise --flood")
            taken = seen.step_seconds[first:]
            rounds[name] = (p99(seconds), p99(steps), sum(taken) / len(taken))
            half = sorted(seconds)[len(seconds) // 2]
            print(f"{name:16} {half:8.3f} {p99(seconds):8.3f} {p99(steps):10.0f} {1000 * rounds[name][2]:8.1f}")
        engine.close()
        alone, beside = rounds["alone"], rounds["beside a flood"]
        print(
            f"p99 beside a flood / alone: {beside[0] / alone[0]:.2f} in seconds, {beside[1] / alone[1]:.2f} in steps; "
            f"one step took {beside[2] / alone[2]:.2f} times as long"
        )


if __name__ == "__main__":
    main()
