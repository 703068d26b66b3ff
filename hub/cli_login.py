"""`hub login`, `hub whoami` and `hub token`."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, print_pairs, print_table
from hub.errors import HubUnavailable

if TYPE_CHECKING:
    from hub.registry.tokens import Token
    from hub.remote.remote_hub import RemoteHub


@click.command(
    epilog=examples(
        """
hub login grpcs://hub.example.org              # asks for the token
hub login grpcs://hub.example.org < token.txt  # or reads it
hub login grpcs://hub.example.org --forget
"""
    )
)
@click.argument("url")
@click.option("--forget", is_flag=True, help="Forget this server's token.")
@json_option
def login(url: str, forget: bool, as_json: bool) -> None:
    """Keep a token for the shared hub at URL, after asking the server whether it is good.

    It is kept in a file that only you can read. The environment's LORAPLEX_HUB_TOKEN goes before it.
    """
    from hub.remote import credentials
    from hub.remote.address import Address
    from hub.remote.cache import Cache
    from hub.remote.connection import Connection
    from hub.remote.remote_hub import RemoteHub

    address = Address.parse(url)
    if forget:
        credentials.remember(address, None)
        if as_json:
            print_json({"hub": str(address), "subject": None})
        else:
            click.echo(f"forgot the token for {address}")
        return
    credentials.check_private(address)
    token = click.prompt("token", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline()
    token = credentials.sendable(token, "what was given")
    with RemoteHub(Connection(address, token), Cache.of(address)) as hub:
        who = hub.who_am_i()
    credentials.remember(address, token)
    if as_json:
        print_json({"hub": str(address), "subject": who.subject})
        return
    click.echo(f"logged in to {address} as {who.subject}")


@click.command(
    epilog=examples(
        """
hub whoami --hub grpcs://hub.example.org
hub whoami --json                              # of LORAPLEX_HUB
"""
    )
)
@hub_option
@json_option
def whoami(hub_url: str | None, as_json: bool) -> None:
    """Whom the shared hub takes you for, and what you may do there."""
    with _shared(hub_url) as hub:
        who = hub.who_am_i()
        place = str(hub.connection.address)
    grants = [f"{grant.namespace}:{','.join(grant.roles)}" for grant in who.grants]
    expires = _time(who.expires) if who.HasField("expires") else "never"
    if as_json:
        print_json({"hub": place, "subject": who.subject, "token": who.token_id, "grants": grants, "expires": expires})
        return
    click.secho(who.subject, bold=True)
    print_pairs({"hub": place, "token": who.token_id, "grants": "  ".join(grants), "expires": expires})


@click.group(
    epilog=examples(
        """
hub token create ci --grant team:push --expires 90
hub token list
hub token revoke 0123456789abcdef
"""
    )
)
def token() -> None:
    """Tokens of a shared hub: run where the hub lies, or with a token that has admin for all namespaces."""


@token.command(
    epilog=examples(
        """
hub token create admin --grant '*:admin'                       # where the hub lies: the first one
hub token create ci-sentiment --grant team:push --expires 90
hub token create deploy --grant team:promote --grant '*:read'
"""
    )
)
@click.argument("subject")
@click.option(
    "--grant",
    "grants",
    multiple=True,
    required=True,
    metavar="NAMESPACE:ROLE[,ROLE]",
    help="What it may: read, push, promote, admin; in a namespace, '.' (names without one) or '*'. Repeatable.",
)
@click.option(
    "--expires", type=click.FloatRange(0, min_open=True), metavar="DAYS", help="Refuse it after so many days."
)
@hub_option
@json_option
def create(subject: str, grants: tuple[str, ...], expires: float | None, hub_url: str | None, as_json: bool) -> None:
    """Make a token for SUBJECT, whom the audit names. It is printed this once; the hub keeps a salted hash."""
    from hub.registry.grants import Grant

    parsed = [Grant.parse(grant) for grant in grants]
    lifetime = expires * 86400 if expires is not None else None
    with _administration(hub_url) as administration:
        made, secret = administration.create(subject, parsed, lifetime)
    if as_json:
        print_json({**_token_json(made), "secret": secret})
        return
    click.echo(f"token {made.id} for {subject}: {'  '.join(map(str, made.grants))}", err=True)
    click.echo(secret)


@token.command("list")
@hub_option
@json_option
def list_tokens(hub_url: str | None, as_json: bool) -> None:
    """All tokens, without their secrets; also those that expired or were revoked."""
    with _administration(hub_url) as administration:
        found = administration.list()
    if as_json:
        print_json([_token_json(each) for each in found])
        return
    rows = [
        [
            each.id,
            each.subject,
            " ".join(map(str, each.grants)),
            _time(each.created),
            each.created_by or "",
            _state(each),
        ]
        for each in found
    ]
    print_table(["token", "subject", "grants", "created", "by", "state"], rows)


@token.command()
@click.argument("identifier", metavar="ID")
@hub_option
@json_option
def revoke(identifier: str, hub_url: str | None, as_json: bool) -> None:
    """Refuse a token from now on; ID is what `hub token list` shows."""
    with _administration(hub_url) as administration:
        revoked = administration.revoke(identifier)
    if as_json:
        print_json(_token_json(revoked))
        return
    click.echo(f"token {revoked.id} of {revoked.subject} is revoked")


def _shared(url: str | None) -> RemoteHub:
    from hub.opening import named
    from hub.remote.address import is_remote
    from hub.remote.remote_hub import RemoteHub

    if not is_remote(named(url)):
        raise HubUnavailable("this hub is no shared one: give --hub grpc://host:port or grpcs://host:port")
    return RemoteHub.open(named(url))


def _administration(url: str | None) -> Any:
    from hub.opening import named, open_own
    from hub.remote.address import is_remote

    if is_remote(named(url)):
        from hub.remote.token_admin import RemoteTokens

        return RemoteTokens(_shared(url))
    from hub.registry.local_tokens import LocalTokens

    return LocalTokens(open_own(url, lambda text: click.echo(text, err=True)))


def _token_json(token: Token) -> dict[str, Any]:
    return {**asdict(token), "grants": list(map(str, token.grants))}


def _time(unix: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(unix))


def _state(token: Token) -> str:
    if token.revoked is not None:
        return f"revoked {_time(token.revoked)}" + (f" by {token.revoked_by}" if token.revoked_by else "")
    if token.expires is None:
        return "good"
    return f"{'good until' if token.expires > time.time() else 'expired'} {_time(token.expires)}"
