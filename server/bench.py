"""Load on a live server, measured from the client's side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

from server.client import AsyncClient, GenerationError, Options

BASE = "base"


@dataclass(frozen=True)
class Load:
    """What is asked of the server."""

    adapters: tuple[str, ...]  # refs, or BASE; requests take them in turn
    prompts: tuple[str, ...]  # chat questions; requests take them in turn
    concurrency: int  # requests in flight
    requests: int  # in all
    new_tokens: int  # per request, end-of-sequence ignored


@dataclass(frozen=True)
class Sample:
    """One request."""

    adapter: str
    first_token: float  # seconds from sending to the first token
    total: float  # seconds
    tokens: int
    gaps: tuple[float, ...]  # seconds between tokens; tokens of one message share its gap


@dataclass
class Measurement:
    """What the load gave."""

    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    failures: dict[tuple[str, str], int] = field(default_factory=dict)  # (adapter, reason) → count
    messages: dict[str, str] = field(default_factory=dict)  # reason → what the server said, once

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all finished requests over the whole time."""
        return sum(sample.tokens for sample in self.samples) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Percentiles:
    """Of one kind of latency, seconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """By nearest rank; None of nothing."""
        if not values:
            return None
        ranked = sorted(values)
        return cls(*(ranked[min(len(ranked) - 1, int(share * len(ranked)))] for share in (0.50, 0.95, 0.99)))


@dataclass(frozen=True)
class Line:
    """One adapter's part of a measurement."""

    adapter: str
    requests: int  # finished
    failed: int
    tokens: int
    first_token: Percentiles | None
    inter_token: Percentiles | None


def lines(measurement: Measurement, adapters: Sequence[str]) -> list[Line]:
    """The measurement by adapter, in the order given."""
    found = []
    for adapter in dict.fromkeys(adapters):
        mine = [sample for sample in measurement.samples if sample.adapter == adapter]
        found.append(
            Line(
                adapter=adapter,
                requests=len(mine),
                failed=sum(count for (name, _), count in measurement.failures.items() if name == adapter),
                tokens=sum(sample.tokens for sample in mine),
                first_token=Percentiles.of([sample.first_token for sample in mine]),
                inter_token=Percentiles.of([gap for sample in mine for gap in sample.gaps]),
            )
        )
    return found


async def run(address: str, load: Load, progress: Callable[[], None] = lambda: None) -> Measurement:
    """Put `load` on the server at `address`; failed requests are counted by reason, not raised.

    `progress` is called after every request.
    """
    measurement = Measurement()
    pairs = islice(zip(cycle(load.adapters), cycle(load.prompts), strict=False), load.requests)

    async def worker(client: AsyncClient) -> None:
        for adapter, prompt in pairs:  # shared: each worker takes the next one
            try:
                measurement.samples.append(await _one(client, adapter, prompt, load.new_tokens))
            except GenerationError as error:
                key = (adapter, error.reason)
                measurement.failures[key] = measurement.failures.get(key, 0) + 1
                measurement.messages.setdefault(error.reason, error.message)
            progress()

    async with AsyncClient(address) as client:
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(load.concurrency, load.requests)):
                group.create_task(worker(client))
        measurement.seconds = time.perf_counter() - started
    return measurement


async def _one(client: AsyncClient, adapter: str, prompt: str, new_tokens: int) -> Sample:
    options: Options = {"max_new_tokens": new_tokens, "ignore_eos": True}
    started = last = time.perf_counter()
    first_token, tokens, gaps = 0.0, 0, list[float]()
    question = [{"role": "user", "content": prompt}]
    async with await client.stream(question, None if adapter == BASE else adapter, **options) as stream:
        async for chunk in stream:
            count = len(chunk.token_ids)
            if not count:
                continue
            now = time.perf_counter()
            if tokens:
                gaps += [(now - last) / count] * count
            else:
                first_token = now - started
            tokens, last = tokens + count, now
    return Sample(adapter, first_token, time.perf_counter() - started, tokens, tuple(gaps))
