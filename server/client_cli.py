"""`hub generate`, `hub feedback` and `hub adapters`: a running server from the terminal."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from hub.byte_size import as_text

if TYPE_CHECKING:
    from server.client import Answer, Options, Rating, Routing

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
    help="An adapter that answers, with its weight; may be given several times. None: the base. auto, or auto:NAME: "
    "what the server's router chooses by the prompt.",
)
@_server_option
@click.option("--system", metavar="TEXT", help="An instruction before PROMPT, as a system message; not with --raw.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens. Default: the server's.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 always takes the likeliest token.")
@click.option("--seed", type=click.IntRange(min=0), help="Same seed, same answer. Default: drawn by the server.")
@click.option(
    "--json-schema",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=str),
    metavar="FILE",
    help="The answer is JSON by this schema.",
)
@click.option("--regex", help="The whole answer matches this regular expression.")
@click.option(
    "--grammar",
    type=click.Path(exists=True, dir_okay=False, path_type=str),
    metavar="FILE",
    help="The answer follows this Lark grammar.",
)
@click.option("--choice", metavar="A,B,...", help="The answer is one of these texts.")
@click.option(
    "--n", "samples", type=click.IntRange(min=1), default=1, show_default=True, help="Answers to draw, each its own."
)
@click.option(
    "--routing-key",
    metavar="KEY",
    help="Picks from a split alias: the same key gets the same version (a user, a session).",
)
@click.option(
    "--chat/--raw", default=True, show_default=True, help="PROMPT as a user's message, or continued as it is."
)
@_json_option
def generate(
    prompt: str,
    asked: tuple[tuple[str, float], ...],
    server: str,
    system: str | None,
    max_new_tokens: int | None,
    temperature: float,
    seed: int | None,
    json_schema: str | None,
    regex: str | None,
    grammar: str | None,
    choice: str | None,
    samples: int,
    routing_key: str | None,
    chat: bool,
    as_json: bool,
) -> int:
    """Ask a running server; the answer appears as it comes. PROMPT may be - for standard input."""
    from server.client import Client

    if system is not None and not chat:
        raise click.UsageError("--system needs a chat; it does not go with --raw")
    text = sys.stdin.read() if prompt == "-" else prompt
    messages = [
        *([{"role": "system", "content": system}] if system is not None else []),
        {"role": "user", "content": text},
    ]
    options: Options = {"temperature": temperature}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    if seed is not None:
        options["seed"] = seed
    if routing_key is not None:
        options["routing_key"] = routing_key
    if samples > 1:
        options["n"] = samples
    _add_structure(options, json_schema, regex, grammar, choice)
    with Client(server) as client:
        with client.stream(messages if chat else text, list(asked), **options) as stream:
            for chunk in stream:
                # Several answers come side by side: they are shown one after the other, at the end.
                if not as_json and samples == 1:
                    click.echo(chunk.text, nl=False)
    answer = stream.answer
    if answer is None:
        raise AssertionError("the stream ended without its last chunk")
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(answer), indent=2, ensure_ascii=False))
        return 0
    if samples > 1:
        for candidate in answer.candidates:
            click.secho(f"[{candidate.index}] ", dim=True, nl=False)
            click.echo(candidate.text)
    else:
        click.echo()
    for warning in answer.warnings:
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    click.secho(_footer(answer), dim=True, err=True)
    return 0


def _add_structure(
    options: Options, json_schema: str | None, regex: str | None, grammar: str | None, choice: str | None
) -> None:
    """Fill in what the answer must be. Raises `click.UsageError` for more than one structure."""
    if sum(given is not None for given in (json_schema, regex, grammar, choice)) > 1:
        raise click.UsageError("give one of --json-schema, --regex, --grammar and --choice")
    if json_schema is not None:
        options["json_schema"] = _text_of(json_schema)
    if regex is not None:
        options["regex"] = regex
    if grammar is not None:
        options["grammar"] = _text_of(grammar)
    if choice is not None:
        options["choice"] = choice.split(",")


def _text_of(file: str) -> str:
    try:
        with click.open_file(file, encoding="utf-8") as opened:
            return str(opened.read())
    except UnicodeDecodeError:
        raise click.UsageError(f"{file} is not UTF-8 text") from None


def _footer(answer: Answer) -> str:
    weights = [each.version if each.weight == 1 else f"{each.version} × {each.weight:g}" for each in answer.adapters]
    facts = [
        " + ".join(weights) or "base",
        *([] if answer.routing is None else [_chosen(answer.routing)]),
        f"{answer.completion_tokens} tokens ({answer.finish_reason.replace('_', ' ')})",
        f"first after {answer.timing.first_token * 1000:.0f} ms",
    ]
    if answer.tokens_per_second:
        facts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    facts.append(f"request {answer.request_id}")
    return " · ".join(facts)


def _chosen(routing: Routing) -> str:
    words = f"nearest of {routing.router}" if routing.chosen else f"none of {routing.router}, nearest {routing.nearest}"
    return f"{words}: {routing.distance:.3g} of {routing.threshold:.3g}"


@click.command(
    epilog="Examples: hub feedback 9f1c…e2 --good · hub feedback 9f1c…e2 --bad --comment 'wrong language' · "
    "hub feedback 9f1c…e2 --correction - < better.txt"
)
@click.argument("request_id")
@click.option("--good", "rating", flag_value="good", help="The answer was good.")
@click.option("--bad", "rating", flag_value="bad", help="The answer was bad.")
@click.option("--correction", metavar="TEXT", help="What the answer should have been; - for standard input.")
@click.option(
    "--candidate", type=click.IntRange(min=0), default=0, show_default=True, help="Which of several answers (--n)."
)
@click.option("--comment", default="", metavar="TEXT", help="For people.")
@_server_option
@_json_option
def feedback(
    request_id: str,
    rating: Rating | None,
    correction: str | None,
    candidate: int,
    comment: str,
    server: str,
    as_json: bool,
) -> int:
    """Tell a running server what an answer was worth; `hub generate` prints REQUEST_ID under the answer.

    Only a server started with --feedback keeps it, for requests answered a short while ago. `hub continual collect`
    makes training data of it. Marking an answer again replaces the mark.
    """
    from server.client import Client

    if rating is None and correction is None:
        raise click.UsageError("give --good, --bad or --correction")
    text = sys.stdin.read() if correction == "-" else correction
    with Client(server) as client:
        replaced = client.feedback(request_id, rating, text, candidate=candidate, comment=comment)
    if as_json:
        click.echo(json.dumps({"request_id": request_id, "replaced": replaced}, indent=2))
    else:
        click.echo("kept, in place of an earlier mark" if replaced else "kept")
    return 0


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
