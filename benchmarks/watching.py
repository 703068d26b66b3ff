"""What the engine tells while it runs, kept for the benchmarks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.population import ask
from server.engine.engine import Engine
from server.engine.observer import Unobserved
from server.engine.outbox import BlockingOutbox
from server.engine.request import AdapterUse, Request


@dataclass(frozen=True)
class Step:
    """One step of the loop."""

    seconds: float
    sequences: int
    tokens: int


class Watch(Unobserved):
    """Every step, every time to first token, every load."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.first_tokens: dict[str, float] = {}  # request id → seconds since arrival
        self.first_steps: dict[str, int] = {}  # request id → the number of the step that gave it
        self.loads: Counter[str] = Counter()  # tier → adapters

    def step(self, *, seconds: float, sequences: int, adapters: int, tokens: int) -> None:
        self.steps.append(Step(seconds, sequences, tokens))

    def first_token(self, request: Request, seconds: float) -> None:
        self.first_tokens[request.id] = seconds
        self.first_steps[request.id] = len(self.steps) + 1

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        self.loads[tier] += 1

    def decode_steps(self, sequences: int, since: int = 0) -> list[float]:
        """Seconds of the steps, from number `since` on, in which exactly `sequences` sequences took one token each."""
        return [step.seconds for step in self.steps[since:] if step.sequences == step.tokens == sequences]


def timed(engine: Engine, uses: Sequence[Sequence[AdapterUse]], new_tokens: int, prompt_tokens: int = 0) -> float:
    """Tokens a second of one call with a request for each of `uses`; raises what a request ended with."""
    requests = [ask(engine, number, each, new_tokens, prompt_tokens) for number, each in enumerate(uses)]
    started = time.perf_counter()
    answers = engine.generate(requests)
    seconds = time.perf_counter() - started
    for answer in answers:
        if answer.error is not None:
            raise answer.error
    return len(requests) * new_tokens / seconds


def answered(engine: Engine, request: Request) -> None:
    """Submit one request and wait for its end; raises what it ended with."""
    outbox = BlockingOutbox()
    engine.submit(request, outbox)
    for delta in outbox:
        if delta.error is not None:
            raise delta.error
