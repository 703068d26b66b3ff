"""A file of prompts, one a line, as several verbs take it."""

from __future__ import annotations

from pathlib import Path

import click


def read_prompts(file: Path) -> tuple[str, ...]:
    """The lines of `file` that hold something; raises click.BadParameter where none does or it is no text."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise click.BadParameter("the file is not UTF-8 text", param_hint="--prompts") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise click.BadParameter("the file holds no prompt", param_hint="--prompts")
    return prompts
