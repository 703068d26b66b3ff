"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from hub.refs import AdapterRef

Verb = Callable[..., Any]


def hub_option(verb: Verb) -> Verb:
    """`--hub URL`, handed to the verb as `hub_url`, fit for `Hub.open`."""
    return click.option(
        "--hub",
        "hub_url",
        metavar="URL",
        help="The hub: file:///directory, a path, postgresql://user@host/database?blobs=/directory, or a shared one, "
        "grpc://host:port or grpcs://host:port.  [default: "
        "$LORAPLEX_HUB, else your data directory]",
    )(verb)


def json_option(verb: Verb) -> Verb:
    """`--json`, handed to the verb as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(verb)


def bare_name(text: str) -> str:
    """The adapter that `text` names, without a version or an alias; raises RefInvalid, and BadParameter for more."""
    full_name = AdapterRef.parse(text).full_name
    if text != full_name:
        raise click.BadParameter(f"{text} says more than an adapter's name: give {full_name}", param_hint="NAME")
    return full_name


def examples(text: str) -> str:
    """`text`, a block of command lines, as an epilog that click does not rewrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in text.strip().splitlines())
