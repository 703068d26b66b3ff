"""The serving half of the demo: one batch of many adapters, and an alias that moves while a stream runs."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic

from prometheus_client.parser import text_string_to_metric_families
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from server.client import AsyncClient
from training.errors import DemoFailed

Messages = Sequence[Mapping[str, str]]


@dataclass
class Row:
    """One request of the mixed batch and what has come of it."""

    question: str  # as shown
    messages: Messages
    adapters: Sequence[tuple[str, float]]
    answer: str = ""
    versions: str = ""
    first_token: float | None = None  # seconds, on the server
    speed: float | None = None  # tokens per second

    @property
    def asked(self) -> str:
        """What the request named."""
        return " + ".join(f"{weight:g} x {ref}" if weight != 1 else ref for ref, weight in self.adapters) or "(base)"


@dataclass
class MoveStory:
    """What was seen while an alias moved."""

    stream_versions: set[str] = field(default_factory=set)
    stream_tokens: int = 0
    after: str = ""
    seconds_to_new: float = 0.0  # from the tag's return to the first answer by the new version
    stream_was_running: bool = False


def mixed_batch(console: Console, address: str, rows: Sequence[Row], max_new_tokens: int) -> None:
    """Send all rows at once and draw the answers as they stream in."""

    async def ask(client: AsyncClient, row: Row) -> None:
        stream = await client.stream(row.messages, list(row.adapters), max_new_tokens=max_new_tokens)
        row.versions = " + ".join(
            f"{used.weight:g} x {used.version}" if used.weight != 1 else used.version for used in stream.adapters
        )
        async for chunk in stream:
            row.answer += chunk.text
        if stream.answer is not None:
            row.first_token, row.speed = stream.answer.timing.first_token, stream.answer.tokens_per_second

    async def ask_all(draw: Callable[[], None]) -> None:
        async with AsyncClient(address) as client:
            asking = asyncio.gather(*(ask(client, row) for row in rows))
            while not asking.done():
                draw()
                await asyncio.wait([asking], timeout=0.1)
            await asking

    if console.is_terminal:
        with Live(console=console, transient=True) as live:
            asyncio.run(ask_all(lambda: live.update(batch_table(rows))))
    else:
        asyncio.run(ask_all(lambda: None))
    console.print(batch_table(rows))


def batch_table(rows: Sequence[Row]) -> Table:
    """Prompt, adapter, answer, time to first token, speed."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", expand=True)
    table.add_column("prompt", ratio=5)
    table.add_column("adapter", ratio=4)
    table.add_column("answer", ratio=8, overflow="fold")
    table.add_column("first token", justify="right", no_wrap=True)
    table.add_column("tok/s", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(shortened(row.question, 90)),
            Text(row.versions or row.asked, style="cyan"),
            Text(shortened(row.answer, 180)),
            f"{row.first_token * 1000:.0f} ms" if row.first_token is not None else "…",
            f"{row.speed:.1f}" if row.speed else "-" if row.first_token is not None else "…",
        )
    return table


def shortened(text: str, limit: int) -> str:
    """One line of at most `limit` characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def move_alias(address: str, ref: str, question: Messages, move: Callable[[], None]) -> MoveStory:
    """Stream from `ref`, call `move` (which points it at another version) meanwhile, then ask again."""
    return asyncio.run(_move_alias(address, ref, question, move))


async def _move_alias(address: str, ref: str, question: Messages, move: Callable[[], None]) -> MoveStory:
    story = MoveStory()
    async with AsyncClient(address) as client:
        first = (await client.generate(question, ref, max_new_tokens=1)).adapters[0].version
        stream = await client.stream(question, ref, max_new_tokens=400, ignore_eos=True)
        started = asyncio.Event()

        async def read() -> None:
            async for chunk in stream:
                story.stream_tokens += len(chunk.token_ids)
                started.set()
            if stream.answer is not None:
                story.stream_versions = {used.version for used in stream.answer.adapters}

        reading = asyncio.create_task(read())
        await started.wait()
        await asyncio.to_thread(move)
        moved = monotonic()
        while True:
            answer = await client.generate(question, ref, max_new_tokens=4)
            story.after = answer.adapters[0].version
            if story.after != first:
                break
            if monotonic() - moved > 30:
                raise DemoFailed(f"{ref} still answers from {first} 30 seconds after it was moved")
            await asyncio.sleep(0.02)
        story.seconds_to_new = monotonic() - moved
        story.stream_was_running = not reading.done()
        await reading
    if story.stream_versions != {first}:
        raise DemoFailed(f"the running stream should have finished on {first}, not {story.stream_versions}")
    return story


def metric(metrics_url: str, name: str) -> float:
    """The value of a metric without labels on the server's page. Raises `DemoFailed` when it is not there."""
    with urllib.request.urlopen(metrics_url, timeout=10) as page:
        for family in text_string_to_metric_families(page.read().decode()):
            for sample in family.samples:
                if sample.name == name and not sample.labels:
                    return float(sample.value)
    raise DemoFailed(f"the server's metrics page has no {name}")
