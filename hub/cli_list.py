"""`hub list` and `hub search`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import parameter_count, print_json, print_table, rank_text, time_text, utc, version_json
from hub.opening import open_existing
from hub.past import removals
from hub.refs import AdapterRef, Version
from hub.search import MetricTest, Query, metric_numbers
from hub.sweep import RETENTION_SECONDS
from hub.versions import Event

_NO_LIMIT = 2**31


def _filters(verb: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.option("--base", metavar="NAME", help="Made for this base: its name, or its fingerprint's start."),
            click.option("--tag", metavar="ALIAS", help="Held by this alias."),
            click.option(
                "--metric", "metrics", multiple=True, metavar="'NAME>VALUE'",
                help="A recorded metric meets this (>, >=, <, <=, ==, !=); nested names have dots; repeatable.",
            ),
            click.option("--limit", type=click.IntRange(1), metavar="N", help="At most so many; stderr says if more."),
            click.option("--after", metavar="NAME@N", help="Go on after this version, the last of the page before."),
        ]
    ):  # fmt: skip
        verb = option(verb)
    return verb


@click.command(
    "list",
    epilog=examples(
        """
hub list
hub list 'team/*' --base smollm2-135m
hub list team/sentiment --all
hub list --metric 'f1>0.8' --limit 50
hub list --removed                   # what `hub restore` can bring back
"""
    ),
)
@click.argument("pattern", required=False)
@click.option("--all", "every", is_flag=True, help="Every version, not only the newest of each adapter.")
@click.option("--removed", is_flag=True, help="The removed versions that can be restored; takes PATTERN alone.")
@_filters
@hub_option
@json_option
def list_versions(
    pattern: str | None, every: bool, removed: bool, hub_url: str | None, as_json: bool, **filters: Any
) -> None:
    """List adapters, each with its newest version. PATTERN is a shell pattern for names ('team/*').

    Conditions are asked of the newest version, with --all of every one; all of them must hold.

    --removed also tells until when `hub gc` spares a version, if it is given no --retention of its own.
    """
    if removed:
        if every or any(filters.values()):
            raise click.UsageError("--removed takes PATTERN and no conditions")
        _print_removed(pattern, hub_url, as_json)
        return
    _print_found(_query(pattern, newest=not every, **filters), hub_url, as_json)


@click.command(
    epilog=examples(
        """
hub search --metric 'f1>0.8' --metric 'loss<1'
hub search 'team/*' --tag prod
hub search --base sha256:1234 --json
"""
    ),
)
@click.argument("pattern", required=False)
@_filters
@hub_option
@json_option
def search(pattern: str | None, hub_url: str | None, as_json: bool, **filters: Any) -> None:
    """Find versions, old ones too, that meet every condition given. PATTERN is a shell pattern for names."""
    _print_found(_query(pattern, newest=False, **filters), hub_url, as_json)


def _query(
    pattern: str | None, *, newest: bool, base: str | None, tag: str | None, metrics: tuple[str, ...],
    limit: int | None, after: str | None,
) -> Query:  # fmt: skip
    query = Query(
        pattern, base, tag.removeprefix(":") if tag else None, tuple(map(MetricTest.parse, metrics)), newest,
        limit=limit or _NO_LIMIT,
    )  # fmt: skip
    if after is None:
        return query
    last = AdapterRef.parse(after)
    if not isinstance(last.selector, Version):
        raise click.BadParameter(f"{after} names no version by number", param_hint="--after")
    return replace(query, after=(last.full_name, last.selector.number))


def _print_removed(pattern: str | None, hub_url: str | None, as_json: bool) -> None:
    with open_existing(hub_url) as hub:
        found = [event for event in removals(hub) if pattern is None or fnmatchcase(event.full_name, pattern)]
    if as_json:
        print_json(
            [
                {
                    "version": event.text, "digest": event.digest, "removed": event.time, "by": event.actor,
                    "until": _spared_until(event),
                }
                for event in found
            ]
        )  # fmt: skip
    elif found:
        rows = [
            [event.text, time_text(event.time), event.actor or "", time_text(_spared_until(event))] for event in found
        ]
        print_table(["version", "removed", "by", "spared until"], rows)
    else:
        click.echo("no removed version can be restored")


def _spared_until(removal: Event) -> str:
    return utc(datetime.fromisoformat(removal.time).timestamp() + RETENTION_SECONDS)


def _print_found(query: Query, hub_url: str | None, as_json: bool) -> None:
    with open_existing(hub_url) as hub:
        page = hub.search(query)
    if as_json:
        print_json([version_json(version, page.aliases[version.digest]) for version in page.versions])
    elif page.versions:
        asked = sorted({test.name for test in query.metrics})
        rows = []
        for version in page.versions:
            numbers = dict(metric_numbers(version.manifest.metrics))
            rows.append(
                [
                    version.text,
                    " ".join(page.aliases[version.digest]),
                    *(f"{numbers[name]:g}" for name in asked),
                    rank_text(version),
                    f"{parameter_count(version):,}",
                    version.manifest.base.name or "unknown",
                    time_text(version.created),
                ]
            )
        print_table(["version", "aliases", *asked, "rank", "parameters", "base", "created"], rows)
    else:
        click.echo("nothing matches" if query != Query(newest=query.newest, limit=query.limit) else "the hub is empty")
    if page.more:
        click.echo(f"there are more: --after {page.versions[-1].text}", err=True)
