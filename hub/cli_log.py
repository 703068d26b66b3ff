"""`hub log` and `hub watch`."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from itertools import islice

import click

from hub.cli_options import bare_name, examples, hub_option, json_option
from hub.cli_output import held_text, print_json, print_table, printable, time_text
from hub.errors import AliasNotFound
from hub.facade import HubFacade
from hub.hub import Event
from hub.opening import open_existing
from hub.past import all_events
from hub.refs import AdapterRef, Alias


@click.command(
    epilog=examples(
        """
hub log
hub log team/sentiment:prod       # the history of one alias
hub log --since 100 --json
hub log --follow --json           # one JSON object a line, as things happen
"""
    )
)
@click.argument("name", required=False)
@click.option("--since", type=click.IntRange(0), default=0, show_default=True, help="Only events after this number.")
@click.option("--follow", is_flag=True, help="Go on as new events come; stop with Ctrl-C.")
@hub_option
@json_option
def log(name: str | None, since: int, follow: bool, hub_url: str | None, as_json: bool) -> None:
    """Every write, oldest first: who, when, what, and for aliases from what to what.

    NAME (an adapter, or one alias of it) asks for its events alone.
    """
    full_name, alias = _wanted(name)
    with open_existing(hub_url) as hub:
        _check_known(hub, full_name)
        if follow:
            for event in hub.watch(since, threading.Event()):
                if _matches(event, full_name, alias):
                    _print_live(event, as_json)
            return
        events = [event for event in all_events(hub, since, full_name) if _matches(event, full_name, alias)]
        if full_name is not None and alias is not None and not events:
            _check_was(hub, full_name, alias)
    if as_json:
        print_json([asdict(event) for event in events])
    elif events:
        print_table(["#", "time", "who", "event", "what"], [_row(event) for event in events])
    else:
        click.echo("no events")


@click.command(
    epilog=examples(
        """
hub watch
hub watch team/sentiment:prod --json | while read -r event; do ./deploy "$event"; done
hub watch --since 120 --count 1       # wait for the first event after number 120
"""
    )
)
@click.argument("name", required=False)
@click.option("--since", type=click.IntRange(0), help="Begin after this event.  [default: after the newest one]")
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N events.")
@hub_option
@json_option
def watch(name: str | None, since: int | None, count: int | None, hub_url: str | None, as_json: bool) -> None:
    """Print events as they happen, none skipped, none twice; with --json one object a line. Ctrl-C ends it.

    To go on after a break, give --since the number of the last event seen.
    """
    full_name, alias = _wanted(name)
    with open_existing(hub_url) as hub:
        _check_known(hub, full_name)
        begin = hub.last_seq() if since is None else since
        events = (event for event in hub.watch(begin, threading.Event()) if _matches(event, full_name, alias))
        for event in islice(events, count):
            _print_live(event, as_json)


def _wanted(name: str | None) -> tuple[str | None, str | None]:
    if name is None:
        return None, None
    ref = AdapterRef.parse(name)
    alias = ref.selector.name if isinstance(ref.selector, Alias) and name != ref.full_name else None
    if alias is None:
        bare_name(name)
    return ref.full_name, alias


def _check_known(hub: HubFacade, full_name: str | None) -> None:
    if full_name is not None:
        hub.aliases(full_name)  # raises AdapterNotFound


def _check_was(hub: HubFacade, full_name: str, alias: str) -> None:
    """Raise AliasNotFound for an alias that never was."""
    if not any(event.alias == alias for event in all_events(hub, 0, full_name)):
        raise AliasNotFound(f"{full_name} never had an alias {alias!r}")


def _matches(event: Event, full_name: str | None, alias: str | None) -> bool:
    return full_name in (None, event.full_name) and alias in (None, event.alias)


def _row(event: Event) -> list[str]:
    what = event.text
    if event.kind == "tag":
        before = f"{held_text(event.before)} -> " if event.before else "-> "
        what = f"{event.full_name}:{event.alias} {before}{held_text(event.after or ((event.version, 1),))}"
    elif event.kind == "untag":
        what = f"{event.full_name}:{event.alias} was {held_text(event.before or ((event.version, 1),))}"
    note = f"  ({event.note})" if event.note else ""
    return [
        str(event.seq), time_text(event.time), event.actor or "", event.kind, f"{what}{note}",
    ]  # fmt: skip


def _print_live(event: Event, as_json: bool) -> None:
    click.echo(json.dumps(asdict(event)) if as_json else printable("  ".join(_row(event))))
