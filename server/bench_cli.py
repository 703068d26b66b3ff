"""`hub bench`: put load on a live server and print what its callers would have seen."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from server.client_cli import server_option
from server.prompt_file import read_prompts

if TYPE_CHECKING:
    from server.bench import Line, Load, Measurement, Percentiles

# Ours: short questions of about the same length.
_PROMPTS = (
    "Tell me a story about a lighthouse keeper and a lost parcel.",
    "Explain how a bicycle stays upright, in simple words.",
    "Plan a quiet Sunday for a family of four in the mountains.",
    "Describe a market street early in the morning.",
)


@click.command(
    epilog="""\b
Examples:
  hub bench                                                    the base alone
  hub bench --adapter base --adapter team/sentiment:prod --concurrency 16 --requests 64
"""
)
@server_option
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="REF",
    help="Requests take the named adapters in turn; `base` is none.  [default: base]",
)
@click.option("--concurrency", type=click.IntRange(1, 4096), default=8, show_default=True, help="Requests in flight.")
@click.option("--requests", type=click.IntRange(min=1), default=32, show_default=True, help="Requests in all.")
@click.option("--max-new-tokens", "new_tokens", type=click.IntRange(min=1), default=32, show_default=True)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Questions, one a line; default: four of ours.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON, seconds throughout.")
def bench(
    server: str,
    adapters: tuple[str, ...],
    concurrency: int,
    requests: int,
    new_tokens: int,
    prompts_file: Path | None,
    as_json: bool,
) -> int:
    """Measure throughput and latency of a running server, by adapter.

    Requests start as others end, so that CONCURRENCY are in flight; end-of-sequence is ignored, so that all answers
    are of one length. Latency is what a streaming client sees. Exits 1 when no request was answered.
    """
    prompts = read_prompts(prompts_file) if prompts_file else _PROMPTS

    from server.bench import BASE, Load, lines

    load = Load(adapters or (BASE,), prompts, concurrency, requests, new_tokens)
    measurement = _run(server, load)
    by_adapter = lines(measurement, load.adapters)
    if as_json:
        click.echo(json.dumps(_as_data(load, measurement, by_adapter), indent=2))
    else:
        _show(load, measurement, by_adapter)
    return 0 if measurement.samples else 1


def _run(address: str, load: Load) -> Measurement:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from server.bench import run

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests", total=load.requests)
        return asyncio.run(run(address, load, lambda: bar.advance(task)))


def _as_data(load: Load, measurement: Measurement, by_adapter: list[Line]) -> dict[str, object]:
    return {
        "concurrency": load.concurrency,
        "requests": load.requests,
        "answered": len(measurement.samples),
        "max_new_tokens": load.new_tokens,
        "seconds": measurement.seconds,
        "tokens_per_second": measurement.tokens_per_second,
        "requests_per_second": len(measurement.samples) / measurement.seconds,
        "adapters": [asdict(line) for line in by_adapter],
        "failures": [
            {"adapter": adapter, "reason": reason, "count": count, "message": measurement.messages[reason]}
            for (adapter, reason), count in sorted(measurement.failures.items())
        ],
    }


def _show(load: Load, measurement: Measurement, by_adapter: list[Line]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=max(240, console.width))
    if measurement.samples:
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1),
            collapse_padding=True,
            title_style="",
            pad_edge=False,
            show_edge=False,
            title="milliseconds to the first token and between tokens",
            title_justify="left",
        )
        table.add_column("adapter", overflow="fold")
        for heading in ("done", "failed", "first p50", "p95", "p99", "next p50", "p95", "p99"):
            table.add_column(heading, justify="right", no_wrap=True)
        for line in by_adapter:
            tally = [str(line.requests), str(line.failed or "–")]
            table.add_row(line.adapter, *tally, *_milliseconds(line.first_token), *_milliseconds(line.inter_token))
        console.print(table)
        console.print(
            f"{measurement.tokens_per_second:.0f} tokens/s, {len(measurement.samples) / measurement.seconds:.2f} "
            f"requests/s over {measurement.seconds:.1f} s with {load.concurrency} in flight"
        )
    counts: dict[str, int] = {}
    for (_, reason), count in measurement.failures.items():
        counts[reason] = counts.get(reason, 0) + count
    for reason, count in sorted(counts.items()):
        click.echo(f"{count} failed with {reason}: {measurement.messages[reason]}", err=True)


def _milliseconds(latency: Percentiles | None) -> list[str]:
    if latency is None:
        return ["–"] * 3
    return [f"{1000 * seconds:.0f}" for seconds in (latency.p50, latency.p95, latency.p99)]
