"""`hub pull`."""

from __future__ import annotations

from pathlib import Path

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, progress_bar, size_text, version_json
from hub.opening import open_existing
from hub.refs import AdapterRef


@click.command(
    epilog=examples(
        """
hub pull team/sentiment            # :latest, into ./sentiment
hub pull team/sentiment:prod out/prod
hub pull team/sentiment@3 out/v3
"""
    )
)
@click.argument("ref")
@click.argument("directory", required=False)
@hub_option
@json_option
def pull(ref: str, directory: str | None, hub_url: str | None, as_json: bool) -> None:
    """Write the version REF names into DIRECTORY, for PEFT's from_pretrained.

    DIRECTORY (the adapter's name, if not given) must be absent or empty. Every byte is checked against the manifest,
    and the directory appears whole or not at all.
    """
    target = Path(directory) if directory else Path(AdapterRef.parse(ref).name)
    with open_existing(hub_url) as hub, progress_bar() as progress:
        version = hub.pull(ref, target, progress)
    if as_json:
        print_json({**version_json(version), "directory": str(target)})
        return
    files = version.manifest.files
    size = size_text(sum(entry.bytes for entry in files.values()))
    click.echo(f"pulled {version.text} into {target}  ({len(files)} files, {size}, verified)")
