"""`hub pull`."""

from __future__ import annotations

from pathlib import Path

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, progress_bar, size_text, version_json
from hub.cli_trust import trust_options
from hub.opening import open_existing
from hub.refs import AdapterRef


@click.command(
    epilog=examples(
        """
hub pull team/sentiment            # :latest, into ./sentiment
hub pull team/sentiment:prod out/prod
hub pull team/sentiment@3 out/v3
hub pull team/sentiment:prod --require-signature --trust release.pub
hub pull team/sentiment@3 --offline
"""
    )
)
@click.argument("ref")
@click.argument("directory", required=False)
@click.option("--offline", is_flag=True, help="From the verified copies on this machine alone; no packet is sent.")
@trust_options
@hub_option
@json_option
def pull(
    ref: str, directory: str | None, offline: bool, trusted_keys: tuple[Path, ...], hub_url: str | None, as_json: bool
) -> None:
    """Write the version REF names into DIRECTORY, for PEFT's from_pretrained.

    DIRECTORY (the adapter's name, if not given) must be absent or empty. Every byte is checked against the manifest,
    and the directory appears whole or not at all; an empty volume mounted there is filled, the config last. A download
    that was cut goes on where it was, also in the next run.

    The directory holds adapter_config.json and adapter_model.safetensors (and README.md, loraplex.json) and no more:
    put side by side, such directories are what vLLM's filesystem resolver and NVIDIA NIM (NIM_PEFT_SOURCE) read.

    With --offline a shared hub's aliases are what they were when last asked; the answer says how long ago.
    """
    from hub.signing.requiring import requiring

    target = Path(directory) if directory else Path(AdapterRef.parse(ref).name)
    if offline:
        from hub.offline import open_offline

        opened = open_offline(hub_url)
    else:
        opened = open_existing(hub_url)
    with opened, progress_bar() as progress:
        version = requiring(opened, trusted_keys).pull(ref, target, progress)
    if as_json:
        print_json({**version_json(version), "directory": str(target)})
        return
    files = version.manifest.files
    size = size_text(sum(entry.bytes for entry in files.values()))
    click.echo(f"pulled {version.text} into {target}  ({len(files)} files, {size}, verified)")
