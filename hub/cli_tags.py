"""`hub tag`, `hub untag` and `hub rollback`."""

from __future__ import annotations

from typing import Any

import click

from hub.cli_options import bare_name, examples, hub_option, json_option
from hub.cli_output import held_text, print_json, version_json
from hub.hub import AliasState
from hub.opening import open_existing
from hub.refs import AdapterRef, Alias


@click.command(
    epilog=examples(
        """
hub tag team/sentiment@3 prod
hub tag team/sentiment:canary prod --expect 2   # only if :prod still is @2
hub tag team/sentiment@1 first --expect 0       # only if :first does not exist
hub tag prod team/sentiment@3=90 team/sentiment@4=10   # a canary: a tenth of the keys get @4
"""
    )
)
@click.argument("first", metavar="REF ALIAS | ALIAS REF=WEIGHT...")
@click.argument("others", nargs=-1, metavar="")
@click.option(
    "--expect", type=click.IntRange(0), metavar="N", help="Only if the alias holds version N now; 0: does not exist."
)
@hub_option
@json_option
def tag(first: str, others: tuple[str, ...], expect: int | None, hub_url: str | None, as_json: bool) -> None:
    """Point ALIAS at the version REF names. Servers that watch the hub follow at once.

    With several REF=WEIGHT the alias is split: whoever resolves it with a key (a user, a session) always gets the same
    version, in these proportions; without a key it is the heaviest.
    """
    if not any("=" in other for other in others):
        if len(others) != 1:
            raise click.UsageError("give REF and ALIAS, or ALIAS and one or more REF=WEIGHT")
        alias = others[0].removeprefix(":")
        with open_existing(hub_url) as hub:
            version = hub.tag(first, alias, expect)
        if as_json:
            print_json({"alias": alias, **version_json(version)})
            return
        click.echo(f"{version.full_name}:{alias} is now {version.text}")
        return
    alias = first.removeprefix(":")
    targets = [_weighted(other) for other in others]
    with open_existing(hub_url) as hub:
        state = hub.split(targets, alias, expect)
    _print_state(targets[0][0].full_name, alias, state, as_json)


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
    full_name = bare_name(name)
    with open_existing(hub_url) as hub:
        state = hub.aliases(full_name).get(alias)
        version = hub.untag(full_name, alias, expect)
    if as_json:
        print_json({"alias": alias, **version_json(version)})
        return
    held = tuple((target.version, target.weight) for target in state.targets) if state else ((version.number, 1),)
    click.echo(f"{full_name}:{alias} is gone; it was {full_name}{held_text(held)}")


@click.command(
    epilog=examples(
        """
hub rollback team/sentiment:prod
hub rollback team/sentiment:prod --expect 4     # only if :prod still is @4
"""
    )
)
@click.argument("alias", metavar="NAME:ALIAS")
@click.option("--expect", type=click.IntRange(0), metavar="N", help="Only if the alias holds version N now.")
@hub_option
@json_option
def rollback(alias: str, expect: int | None, hub_url: str | None, as_json: bool) -> None:
    """Give an alias back what it held before its last move; once more, the move before that.

    A removed alias comes back. `hub log NAME` shows every move.
    """
    ref = AdapterRef.parse(alias)
    if not isinstance(ref.selector, Alias):
        raise click.BadParameter("name an alias, such as team/sentiment:prod", param_hint="NAME:ALIAS")
    with open_existing(hub_url) as hub:
        state = hub.rollback(ref.full_name, ref.selector.name, expect)
    _print_state(ref.full_name, ref.selector.name, state, as_json)


def _weighted(text: str) -> tuple[AdapterRef, int]:
    ref, equals, weight = text.rpartition("=")
    if not equals or not weight.isascii() or not weight.isdigit() or len(weight) > 9:
        raise click.UsageError(f"{text[:100]!a} is no REF=WEIGHT with a whole number")
    return AdapterRef.parse(ref), int(weight)


def _print_state(full_name: str, alias: str, state: AliasState, as_json: bool) -> None:
    if as_json:
        print_json(state_json(full_name, alias, state))
        return
    held = tuple((target.version, target.weight) for target in state.targets)
    click.echo(f"{full_name}:{alias} is now {held_text(held)}")


def state_json(full_name: str, alias: str, state: AliasState) -> dict[str, Any]:
    """What an alias holds, for `--json`."""
    return {
        "name": full_name,
        "alias": alias,
        "generation": state.generation,
        "targets": [
            {"version": f"{full_name}@{target.version}", "digest": target.digest, "weight": target.weight}
            for target in state.targets
        ],
    }
