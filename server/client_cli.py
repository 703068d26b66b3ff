"""`hub generate` and `hub adapters`: a running server from the terminal."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from server.byte_size import as_text

if TYPE_CHECKING:
    from server.client import Answer

DEFAULT_SERVER = "127.0.0.1:50051"


class AskedAdapter(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic only in new releases
    """REF or REF=WEIGHT."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """The ref and its weight; fails with wrong usage."""
        if isinstance(value, tuple):
            return value
        ref, equals, weight = str(value).partition("=")
        try:
            return ref, float(weight) if equals else 1.0
        except ValueError:
            self.fail(f"{weight!r} is no weight: write REF=0.5", param, ctx)


_server_option = click.option(
    "--server",
    envvar="LORAPLEX_SERVER",
    default=DEFAULT_SERVER,
    show_default=True,
    show_envvar=True,
    metavar="HOST:PORT",
    help="A running `hub serve`.",
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command(
    epilog="Examples: hub generate 'Dull from start to end.' --adapter team/sentiment:prod · "
    "cat policy.txt | hub generate - --adapter team/iam=0.7 --adapter team/terse"
)
@click.argument("prompt")
@click.option(
    "--adapter",
    "-a",
    "asked",
    multiple=True,
    type=AskedAdapter(),
    metavar="REF[=WEIGHT]",
    help="An adapter that answers, with its weight; may be given several times. None: the base.",
)
@_server_option
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens. Default: the server's.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 always takes the likeliest token.")
@click.option("--seed", type=click.IntRange(min=0), help="Same seed, same answer. Default: drawn by the server.")
@click.option(
    "--chat/--raw", default=True, show_default=True, help="PROMPT as a user's message, or continued as it is."
)
@_json_option
def generate(
    prompt: str,
    asked: tuple[tuple[str, float], ...],
    server: str,
    max_new_tokens: int | None,
    temperature: float,
    seed: int | None,
    chat: bool,
    as_json: bool,
) -> int:
    """Ask a running server; the answer appears as it comes. PROMPT may be - for standard input."""
    from server.client import Client, Options

    text = sys.stdin.read() if prompt == "-" else prompt
    options: Options = {"temperature": temperature}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    if seed is not None:
        options["seed"] = seed
    with Client(server) as client:
        with client.stream([{"role": "user", "content": text}] if chat else text, list(asked), **options) as stream:
            for chunk in stream:
                if not as_json:
                    click.echo(chunk.text, nl=False)
    answer = stream.answer
    if answer is None:
        raise AssertionError("the stream ended without its last chunk")
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(answer), indent=2, ensure_ascii=False))
        return 0
    click.echo()
    for warning in answer.warnings:
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    click.secho(_footer(answer), dim=True, err=True)
    return 0


def _footer(answer: Answer) -> str:
    weights = [each.version if each.weight == 1 else f"{each.version} × {each.weight:g}" for each in answer.adapters]
    facts = [
        " + ".join(weights) or "base",
        f"{answer.completion_tokens} tokens ({answer.finish_reason.replace('_', ' ')})",
        f"first after {answer.timing.first_token * 1000:.0f} ms",
    ]
    if answer.tokens_per_second:
        facts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    return " · ".join(facts)


@click.command()
@_server_option
@_json_option
def adapters(server: str, as_json: bool) -> int:
    """Which adapters a running server holds, and where: on the device (ready), on the host, or loading."""
    from server.client import Client

    with Client(server) as client:
        held = client.adapters()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(each) for each in held], indent=2))
        return 0
    if not held:
        click.echo("no adapters yet: the first request that names one loads it")
        return 0
    rows = [("ADAPTER", "TIER", "RANK", "DEVICE", "HOST", "IN FLIGHT", "DIGEST")]
    for each in held:
        rows.append(
            (
                each.version or "?",
                each.tier + (" (draining)" if each.draining else ""),
                str(each.rank or "-"),
                as_text(each.device_bytes) if each.device_bytes else "-",
                as_text(each.host_bytes) if each.host_bytes else "-",
                str(each.requests_in_flight),
                each.digest[7:19],
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
