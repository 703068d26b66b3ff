"""Options about keys that several verbs share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Verb = Callable[..., Any]
_FILE = click.Path(dir_okay=False, path_type=Path)


def trust_options(verb: Verb) -> Verb:
    """`--require-signature --trust FILE…`, handed to the verb as `trusted_keys`: the files, none where not required."""

    @click.option(
        "--require-signature",
        is_flag=True,
        help="Refuse versions that no trusted key signed.",
    )
    @trust_option
    @functools.wraps(verb)
    def checked(*arguments: Any, require_signature: bool, trust: tuple[Path, ...], **options: Any) -> Any:
        if require_signature and not trust:
            raise click.UsageError("--require-signature needs to know whom to trust: give --trust FILE")
        if trust and not require_signature and _given("trust"):
            raise click.UsageError("--trust says whom to trust; add --require-signature to ask for their signature")
        return verb(*arguments, trusted_keys=trust if require_signature else (), **options)

    return checked


def trust_option(verb: Verb) -> Verb:
    """`--trust FILE…`, handed to the verb as `trust`."""
    return click.option(
        "--trust",
        multiple=True,
        type=_FILE,
        metavar="FILE",
        envvar="LORAPLEX_TRUST",
        show_envvar=True,
        help="A public key (PEM) whose signatures count; repeatable, and a file may hold several.",
    )(verb)


def key_option(verb: Verb) -> Verb:
    """`--key FILE`, handed to the verb as `key_file`."""
    return click.option(
        "--key",
        "key_file",
        type=_FILE,
        metavar="FILE",
        help="The private key (PEM) to sign with.  [default: $LORAPLEX_SIGNING_KEY, else signing.key in your "
        "configuration directory]",
    )(verb)


def _given(name: str) -> bool:
    """Whether the option stands on the command line, not in the environment alone."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE
