"""`hub verify`."""

from __future__ import annotations

from dataclasses import asdict

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, print_table, progress_bar
from hub.hub import Hub


@click.command(
    epilog=examples(
        """
hub verify
hub verify team/sentiment:prod
"""
    )
)
@click.argument("ref", required=False)
@hub_option
@json_option
@click.pass_context
def verify(ctx: click.Context, ref: str | None, hub_url: str | None, as_json: bool) -> None:
    """Read every stored byte of the version REF names, or of the whole hub, and check it.

    Exits 1 where something is damaged. Pushing the same directory again mends a damaged file.
    """
    with Hub.open(hub_url) as hub:
        with progress_bar() as progress:
            problems = hub.verify(ref, progress)
        count = 0 if problems else len(hub.versions()) if ref is None else 1
    if as_json:
        print_json([asdict(problem) for problem in problems])
    elif problems:
        print_table(
            ["version", "file", "reason", "problem"],
            [[problem.version, problem.file or "", problem.reason, problem.message] for problem in problems],
        )
        click.secho("pushing the damaged versions' directories again mends their files", fg="yellow", err=True)
    else:
        click.echo(f"{count} {'version' if count == 1 else 'versions'} checked, all sound")
    ctx.exit(1 if problems else 0)
