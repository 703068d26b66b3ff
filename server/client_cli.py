"""`hub generate`, `hub feedback` and `hub adapters`: a running server from the terminal."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from typing import TYPE_CHECKING, Any, cast

import click

from hub.byte_size import as_text

if TYPE_CHECKING:
    from server.client import Answer, AnswerStream, Options, Rating, Routing

DEFAULT_SERVER = "127.0.0.1:50051"
MOST = 2**32 - 1  # of counts, as the calls' messages hold them
STDIN = "-"


class Utf8(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic only in new releases
    """Text that a message can hold: a shell hands over any bytes."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text; fails with wrong usage."""
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError:
            self.fail("it is not UTF-8 text", param, ctx)
        return text


UTF8 = Utf8()


class AskedAdapter(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic only in new releases
    """REF or REF=WEIGHT."""

    name = "adapter"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """The ref and its weight; fails with wrong usage."""
        if isinstance(value, tuple):
            return value
        ref, equals, weight = UTF8.convert(value, param, ctx).partition("=")
        try:
            return ref, float(weight) if equals else 1.0
        except ValueError:
            self.fail(f"{weight!r} is no weight: write REF=0.5", param, ctx)


server_option = click.option(
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
@click.argument("prompt", type=UTF8)
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
@server_option
@click.option(
    "--system", type=UTF8, metavar="TEXT", help="An instruction before PROMPT, as a system message; not with --raw."
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1, MOST), help="Longest answer, in tokens. Default: the server's."
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 always takes the likeliest token.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens that together have this probability.")
@click.option("--top-k", type=click.IntRange(0, MOST), help="Draw from this many of the likeliest tokens; 0: from all.")
@click.option("--min-p", type=float, help="Draw no token below this share of the likeliest one's probability.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Same seed, same answer. Default: drawn by the server.")
@click.option(
    "--stop", multiple=True, type=UTF8, metavar="TEXT", help="End before this text; may be given several times."
)
@click.option(
    "--json-schema",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=str),
    metavar="FILE",
    help="The answer is JSON by this schema; - for standard input.",
)
@click.option("--regex", type=UTF8, help="The whole answer matches this regular expression.")
@click.option(
    "--grammar",
    type=click.Path(exists=True, dir_okay=False, path_type=str),
    metavar="FILE",
    help="The answer follows this Lark grammar.",
)
@click.option("--choice", type=UTF8, metavar="A,B,...", help="The answer is one of these texts.")
@click.option(
    "--n", "samples", type=click.IntRange(1, MOST), default=1, show_default=True, help="Answers to draw, each its own."
)
@click.option(
    "--logprobs",
    type=click.IntRange(0, MOST),
    metavar="N",
    help="With --json: the log-probability of every token and of the N best at its place.",
)
@click.option(
    "--routing-key",
    type=UTF8,
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
    stop: tuple[str, ...],
    json_schema: str | None,
    regex: str | None,
    grammar: str | None,
    choice: str | None,
    samples: int,
    chat: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Ask a running server; the answer appears as it comes. PROMPT may be - for standard input."""
    from server.client import Client

    if system is not None and not chat:
        raise click.UsageError("--system needs a chat; it does not go with --raw")
    if given["logprobs"] is not None and not as_json:
        raise click.UsageError("log-probabilities are shown as JSON only: add --json")
    if prompt == json_schema == STDIN:
        raise click.UsageError("standard input is either PROMPT or the schema: give one of them otherwise")
    text = _text_of(STDIN) if prompt == STDIN else prompt
    messages = [
        *([{"role": "system", "content": system}] if system is not None else []),
        {"role": "user", "content": text},
    ]
    # The rest have the names of the client's options; what was not given is left to the server.
    options = cast("Options", {name: value for name, value in given.items() if value is not None})
    options["stop"] = stop
    if samples > 1:
        options["n"] = samples
    _add_structure(options, json_schema, regex, grammar, choice)
    with Client(server) as client:
        with client.stream(messages if chat else text, list(asked), **options) as stream:
            if as_json or samples > 1:
                deque(stream, maxlen=0)  # several answers come side by side: they are shown at the end
            else:
                _show(stream)
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
    for warning in answer.warnings:
        click.secho(f"warning: {warning}", fg="yellow", err=True)
    click.secho(_footer(answer), dim=True, err=True)
    return 0


def _show(stream: AnswerStream) -> None:
    """The answer as it comes, and the end of its line, also where it breaks off."""
    from server.client import GenerationError

    shown = False
    try:
        for chunk in stream:
            click.echo(chunk.text, nl=False)
            shown = shown or bool(chunk.text)
    except GenerationError:
        if shown:
            click.echo()
        raise
    click.echo()


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
    """The text of a file, or of standard input."""
    try:
        with click.open_file(file, encoding="utf-8") as opened:
            return str(opened.read())
    except UnicodeDecodeError:
        name = "standard input" if file == STDIN else file
        raise click.UsageError(f"{name} is not UTF-8 text") from None


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
@click.argument("request_id", type=UTF8)
@click.option("--good", is_flag=True, help="The answer was good.")
@click.option("--bad", is_flag=True, help="The answer was bad.")
@click.option("--correction", type=UTF8, metavar="TEXT", help="What the answer should have been; - for standard input.")
@click.option(
    "--candidate", type=click.IntRange(0, MOST), default=0, show_default=True, help="Which of several answers (--n)."
)
@click.option("--comment", type=UTF8, default="", metavar="TEXT", help="For people.")
@server_option
@_json_option
def feedback(
    request_id: str,
    good: bool,
    bad: bool,
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

    if good and bad:
        raise click.UsageError("an answer is --good or --bad, not both")
    rating: Rating | None = "good" if good else "bad" if bad else None
    if rating is None and correction is None:
        raise click.UsageError("give --good, --bad or --correction")
    text = _text_of(STDIN) if correction == STDIN else correction
    with Client(server) as client:
        replaced = client.feedback(request_id, rating, text, candidate=candidate, comment=comment)
    if as_json:
        click.echo(json.dumps({"request_id": request_id, "replaced": replaced}, indent=2))
    else:
        click.echo("kept, in place of an earlier mark" if replaced else "kept")
    return 0


@click.command()
@server_option
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
