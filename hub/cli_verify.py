"""`hub verify` and `hub fsck`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, print_table, progress_bar
from hub.cli_trust import trust_options
from hub.errors import BlobCorrupt, HubError
from hub.hub import Problem, Version
from hub.opening import open_existing

if TYPE_CHECKING:
    from hub.facade import HubFacade


@click.command(
    epilog=examples(
        """
hub verify
hub verify team/sentiment:prod
hub verify --require-signature --trust release.pub     # also: everything is signed by that key
"""
    )
)
@click.argument("ref", required=False)
@trust_options
@hub_option
@json_option
@click.pass_context
def verify(
    ctx: click.Context, ref: str | None, trusted_keys: tuple[Path, ...], hub_url: str | None, as_json: bool
) -> None:
    """Read every stored byte of the version REF names, or of the whole hub, and check it.

    Exits 1 where something is damaged. Pushing the same directory again mends a damaged file. Signatures are read too,
    and must be of the version they are kept for; with --require-signature every version needs one of a trusted key.
    """
    with open_existing(hub_url) as hub:
        with progress_bar() as progress:
            problems = hub.verify(ref, progress)
        versions = [hub.resolve(ref)] if ref is not None and not problems else []
        if ref is None and (trusted_keys or not problems):
            versions = hub.versions()
        count = len(versions)
        if trusted_keys:
            problems += _unsigned(hub, versions, trusted_keys)
    if as_json:
        print_json([asdict(problem) for problem in problems])
    elif problems:
        print_table(
            ["version", "file", "reason", "problem"],
            [[problem.version, problem.file or "", problem.reason, problem.message] for problem in problems],
        )
        if any(problem.reason == BlobCorrupt.reason for problem in problems):
            click.secho("pushing the damaged versions' directories again mends their files", fg="yellow", err=True)
    else:
        signed = " and signed" if trusted_keys else ""
        click.echo(f"{count} {'version' if count == 1 else 'versions'} checked, all sound{signed}")
    ctx.exit(1 if problems else 0)


def _unsigned(hub: HubFacade, versions: list[Version], keys: tuple[Path, ...]) -> list[Problem]:
    """The versions that none of these keys signed."""
    from hub.signing.policy import TrustPolicy

    policy = TrustPolicy.read(keys)
    problems = []
    for version in versions:
        try:
            policy.check(version, hub.signatures(version.digest))
        except HubError as error:
            problems.append(Problem(version.text, None, error.reason, str(error)))
    return problems


@click.command(
    epilog=examples(
        """
hub fsck
hub fsck --rebuild     # the catalog is lost or damaged; stop everything that writes to the hub first
"""
    )
)
@click.option("--rebuild", is_flag=True, help="Make the catalog anew from the journal and the manifests.")
@hub_option
@json_option
@click.pass_context
def fsck(ctx: click.Context, rebuild: bool, hub_url: str | None, as_json: bool) -> None:
    """Check that catalog, journal and blobs tell the same story; reads no adapter's bytes (`hub verify` does).

    With --rebuild the catalog - versions, their numbers, lineage, aliases, history, pins - is made anew from what lies
    beside it and from the old catalog as far as that is sound, and then checked. Damaged records of the journal are
    written again where the catalog has them. The old database file is kept under another name; where it is lost or
    damaged, so are the tokens of `hub registry`. Exits 1 where something is wrong or lost; what was lost is told once,
    and leaves the hub sound. A hub of a newer release is refused.
    """
    lost: list[Problem] = []
    if rebuild:
        from hub.rebuild import rebuild as make_anew

        made = make_anew(hub_url)
        lost += made.lost
        if not as_json:
            click.echo(
                f"rebuilt {made.versions} versions and {made.aliases} aliases from {made.events} events", err=True
            )
            if made.kept_as:
                click.echo(f"the old catalog is kept as {made.kept_as}", err=True)
        if made.new_file:
            click.secho(
                "tokens are in no journal: if `hub registry` offers this hub, make new ones with `hub token create`",
                fg="yellow", err=True,
            )  # fmt: skip
    with open_existing(hub_url) as hub, progress_bar() as progress:
        problems = lost + hub.fsck(progress)
    if as_json:
        print_json([asdict(problem) for problem in problems])
    elif problems:
        print_table(
            ["where", "file", "reason", "problem"],
            [[problem.version, problem.file or "", problem.reason, problem.message] for problem in problems],
        )
    else:
        click.echo("catalog, journal and blobs fit together")
    ctx.exit(1 if problems else 0)
