"""`hub tag`, `hub untag` and `hub log`."""

from __future__ import annotations

import threading
from dataclasses import asdict

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, print_table, version_json
from hub.hub import Event, Hub
from hub.refs import AdapterRef


@click.command(
    epilog=examples(
        """
hub tag team/sentiment@3 prod
hub tag team/sentiment:canary prod --expect 2   # only if :prod still is @2
hub tag team/sentiment@1 first --expect 0       # only if :first does not exist
"""
    )
)
@click.argument("ref")
@click.argument("alias")
@click.option(
    "--expect", type=click.IntRange(0), metavar="N", help="Only if the alias holds version N now; 0: does not exist."
)
@hub_option
@json_option
def tag(ref: str, alias: str, expect: int | None, hub_url: str | None, as_json: bool) -> None:
    """Point ALIAS at the version REF names. Servers that watch the hub follow at once."""
    alias = alias.removeprefix(":")
    with Hub.open(hub_url) as hub:
        version = hub.tag(ref, alias, expect)
    if as_json:
        print_json({"alias": alias, **version_json(version)})
        return
    click.echo(f"{version.full_name}:{alias} is now {version.text}")


@click.command(
    epilog=examples(
        """
hub untag team/sentiment canary
hub untag team/sentiment canary --expect 3
"""
    )
)
@click.argument("name")
@click.argument("alias")
@click.option("--expect", type=click.IntRange(1), metavar="N", help="Only if the alias holds version N now.")
@hub_option
@json_option
def untag(name: str, alias: str, expect: int | None, hub_url: str | None, as_json: bool) -> None:
    """Remove ALIAS from the adapter NAME. The version it held stays."""
    alias = alias.removeprefix(":")
    with Hub.open(hub_url) as hub:
        version = hub.untag(name, alias, expect)
    if as_json:
        print_json({"alias": alias, **version_json(version)})
        return
    click.echo(f"{version.full_name}:{alias} is gone; it was {version.text}")


@click.command(
    epilog=examples(
        """
hub log
hub log team/sentiment
hub log --follow --json      # one JSON object a line, as things happen
"""
    )
)
@click.argument("name", required=False)
@click.option("--since", type=click.IntRange(0), default=0, show_default=True, help="Only events after this number.")
@click.option("--follow", is_flag=True, help="Go on as new events come; stop with Ctrl-C.")
@hub_option
@json_option
def log(name: str | None, since: int, follow: bool, hub_url: str | None, as_json: bool) -> None:
    """The journal: every push, tag and untag, oldest first; of the adapter NAME or of the whole hub."""
    wanted = AdapterRef.parse(name).full_name if name else None
    with Hub.open(hub_url) as hub:
        if wanted:
            hub.aliases(wanted)  # refuses an unknown name
        if follow:
            for event in hub.watch(since, threading.Event()):
                if wanted in (None, event.full_name):
                    _print_live(event, as_json)
            return
        events = [event for event in _all_events(hub, since) if wanted in (None, event.full_name)]
    if as_json:
        print_json([asdict(event) for event in events])
    elif events:
        print_table(["#", "time", "event", "what"], [_row(event) for event in events])
    else:
        click.echo("no events")


def _all_events(hub: Hub, since: int) -> list[Event]:
    events: list[Event] = []
    while batch := hub.events(since, limit=1000):
        events += batch
        since = batch[-1].seq
    return events


def _row(event: Event) -> list[str]:
    time = event.time.replace("T", " ").removesuffix("Z")
    if event.alias is None:
        return [str(event.seq), time, event.kind, event.text]
    arrow = "->" if event.kind == "tag" else "was"
    return [str(event.seq), time, event.kind, f"{event.full_name}:{event.alias} {arrow} @{event.version}"]


def _print_live(event: Event, as_json: bool) -> None:
    if as_json:
        import json

        click.echo(json.dumps(asdict(event)))
    else:
        click.echo("  ".join(_row(event)))
