"""`hub rm`, `hub restore`, `hub gc`, `hub pin` and `hub unpin`."""

from __future__ import annotations

from dataclasses import asdict

import click

from hub.actor import current_user
from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import holder_text, print_json, size_text, version_json
from hub.duration import Duration
from hub.opening import open_existing


@click.command(
    epilog=examples(
        """
hub rm team/sentiment@2
hub restore team/sentiment@2    # within the retention of `hub gc`, seven days unless told otherwise
"""
    )
)
@click.argument("ref")
@hub_option
@json_option
def rm(ref: str, hub_url: str | None, as_json: bool) -> None:
    """Mark the version REF names as removed: nobody finds it any more. Its number is never given again.

    Refused while an alias (:latest too), a pin or a server's lease holds it. `hub gc` takes its bytes once the
    retention is over; `hub restore` brings it back until then, and so does pushing the same directory again.
    """
    with open_existing(hub_url) as hub:
        version = hub.remove(ref)
    if as_json:
        print_json(version_json(version))
    else:
        click.echo(f"removed {version.text}; `hub restore {version.text}` brings it back until `hub gc` takes it")


@click.command(
    epilog=examples(
        """
hub restore team/sentiment@2
"""
    )
)
@click.argument("ref")
@hub_option
@json_option
def restore(ref: str, hub_url: str | None, as_json: bool) -> None:
    """Bring a removed version back; REF has a number or a digest. Aliases are not moved."""
    with open_existing(hub_url) as hub:
        version = hub.restore(ref)
    if as_json:
        print_json(version_json(version))
    else:
        click.echo(f"{version.text} is back")


@click.command(
    epilog=examples(
        """
hub gc --dry-run
hub gc
hub gc --retention 30d
"""
    )
)
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would go.")
@click.option(
    "--retention", type=Duration(), default="7d", show_default=True, help="How long removed versions can be restored."
)
@click.option(
    "--grace", type=Duration(), default="1h", show_default=True, help="Leave what was written more recently alone."
)
@hub_option
@json_option
def gc(dry_run: bool, retention: float, grace: float, hub_url: str | None, as_json: bool) -> None:
    """Give back space: versions removed long ago, files no version needs, leavings of pushes that died.

    Safe while others push and pull. A file that another version shares stays.
    """
    with open_existing(hub_url) as hub:
        swept = hub.sweep(retention_seconds=retention, grace_seconds=grace, dry_run=dry_run)
    if as_json:
        print_json({**asdict(swept), "dry_run": dry_run})
        return
    verb = "would go" if dry_run else "went"
    for text in swept.purged:
        click.echo(f"{text} {verb} for good")
    click.echo(
        f"{swept.blobs} files and {swept.leftovers} leftovers of dead pushes {verb}: {size_text(swept.bytes)}"
        if swept.bytes
        else "no bytes to give back"
    )


@click.command(
    epilog=examples(
        """
hub pin team/sentiment@2
hub pin team/sentiment@2 --holder audit-2026 --for 30d
"""
    )
)
@click.argument("ref")
@click.option("--holder", metavar="TEXT", help="Who or what needs it.  [default: your user name]")
@click.option("--for", "seconds", type=Duration(), help="Only for so long (10m, 2h, 7d).  [default: until `unpin`]")
@hub_option
@json_option
def pin(ref: str, holder: str | None, seconds: float | None, hub_url: str | None, as_json: bool) -> None:
    """Keep the version REF names from being removed."""
    if seconds == 0:
        raise click.BadParameter("a pin for no time keeps nothing; `hub unpin` takes one back", param_hint="--for")
    with open_existing(hub_url) as hub:
        lease = hub.lease(ref, holder or current_user() or "unknown", seconds)
    if as_json:
        print_json(asdict(lease))
    else:
        click.echo(f"{lease.full_name}@{lease.version} is pinned by {holder_text(lease)}")


@click.command(
    epilog=examples(
        """
hub unpin team/sentiment@2
hub unpin team/sentiment@2 --holder audit-2026
"""
    )
)
@click.argument("ref")
@click.option("--holder", metavar="TEXT", help="Whose pin.  [default: your user name]")
@hub_option
@json_option
def unpin(ref: str, holder: str | None, hub_url: str | None, as_json: bool) -> None:
    """Take a pin back; nothing happens where there is none."""
    who = holder or current_user() or "unknown"
    with open_existing(hub_url) as hub:
        hub.release(ref, who)
        version = hub.resolve(ref)
        left = [lease for lease in hub.leases(version.full_name) if lease.version == version.number]
    if as_json:
        print_json({"version": version.text, "holder": who, "left": [asdict(lease) for lease in left]})
        return
    others = f", but by {', '.join(lease.holder for lease in left)}" if left else ""
    click.echo(f"{version.text} is not pinned by {who}{others}")
