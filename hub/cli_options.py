"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

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


def examples(text: str) -> str:
    """`text`, a block of command lines, as an epilog that click does not rewrap."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in text.strip().splitlines())
