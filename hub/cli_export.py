"""What `hub export` writes for other hubs: a bundle, or a Hugging Face repository. The verb itself is the server's,
which knows llama.cpp's format too.
"""

from __future__ import annotations

from pathlib import Path

import click

from hub.cli_output import print_json, progress_bar, size_text
from hub.opening import open_existing


def to_bundle(refs: tuple[str, ...], target: Path, hub_url: str | None, as_json: bool) -> None:
    """Write a bundle and say what is in it."""
    from hub.exporting import export_bundle

    with open_existing(hub_url) as hub, progress_bar() as progress:
        versions, aliases, size = export_bundle(hub, refs, target, progress)
    if as_json:
        print_json(
            {
                "file": str(target), "bytes": size,
                "versions": [{"version": version.text, "digest": version.digest} for version in versions],
                "aliases": [f"{alias.full_name}:{alias.alias}" for alias in aliases],
            }
        )  # fmt: skip
        return
    count = f"{len(versions)} version{'' if len(versions) == 1 else 's'}"
    click.secho(f"exported {count} into {target}  ({size_text(size)})", bold=True)
    for version in versions:
        held = [
            f":{alias.alias}" for alias in aliases
            if alias.full_name == version.full_name and any(number == version.number for number, _ in alias.held)
        ]  # fmt: skip
        click.echo(f"  {version.text}  {version.digest[:19]}  {' '.join(held)}".rstrip())


def to_hugging_face(
    ref: str, target: str, *, public: bool, base_model: str | None, hub_url: str | None, as_json: bool
) -> None:
    """Write a version to a repository and say where."""
    from hub.hugging_face.address import Address
    from hub.hugging_face.publishing import publish

    address = Address.parse(target)
    with open_existing(hub_url) as hub, progress_bar() as progress:
        made = publish(hub, ref, address, public=public, base_model=base_model, progress=progress)
    if as_json:
        print_json(
            {
                "version": made.version.text, "digest": made.version.digest, "repository": address.repository,
                "commit": made.commit, "url": made.url, "files": list(made.files),
            }
        )  # fmt: skip
        return
    click.secho(f"exported {made.version.text} to {address} at {made.commit[:12]}", bold=True)
    click.echo(f"  {made.url}")
    if not made.has_base:
        click.secho("warning: the card names no base_model; give --base-model org/name", fg="yellow", err=True)
