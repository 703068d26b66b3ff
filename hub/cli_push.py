"""`hub push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.actor import current_user
from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import base_text, lora_text, print_json, print_pairs, progress_bar, size_text, version_json
from hub.cli_trust import key_option
from hub.opening import open_hub
from hub.refs import AdapterRef
from hub.stated_facts import directory_with, metric_facts
from hub.versions import PushResult

if TYPE_CHECKING:
    from hub.signing.keys import SigningKey


@click.command(
    epilog=examples(
        """
hub push out/sentiment team/sentiment --base smollm2-135m
hub push out/sentiment team/sentiment --alias prod --alias canary
hub push out/sentiment team/sentiment --parent team/sentiment@1
hub push out/sentiment team/sentiment --dataset reviews.jsonl --metrics f1=0.83
hub push out/sentiment team/sentiment --sign --key release.key
"""
    )
)
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.argument("ref")
@click.option("--base", metavar="NAME|DIR", help="The base it was trained on; every tensor is checked against it.")
@click.option("--alias", "aliases", multiple=True, metavar="ALIAS", help="Also point this alias at it; repeatable.")
@click.option("--parent", "parents", multiple=True, metavar="REF", help="A version it was made from; repeatable.")
@click.option(
    "--dataset",
    "datasets",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Record the digest of a file it was trained on; repeatable.",
)
@click.option(
    "--metrics",
    multiple=True,
    metavar="NAME=N|FILE",
    help="Record a metric, or those in a file with a JSON object; repeatable.",
)
@click.option("--sign", is_flag=True, help="Sign the version; --alias moves only when it is signed.")
@key_option
@hub_option
@json_option
def push(
    directory: str,
    ref: str,
    base: str | None,
    aliases: tuple[str, ...],
    parents: tuple[str, ...],
    datasets: tuple[Path, ...],
    metrics: tuple[str, ...],
    sign: bool,
    key_file: Path | None,
    hub_url: str | None,
    as_json: bool,
) -> None:
    """Store the LoRA in DIRECTORY, as PEFT saved it, or a whole model as the next version of REF.

    REF is [namespace/]name. The version gets the next number, :latest and every --alias. Pushing what is there already
    creates nothing. The directory may hold adapter_config.json, adapter_model.safetensors, README.md and loraplex.json
    (what `hub train` recorded); anything else is refused by name, and so are weights that are damaged, not finite or
    do not fit the base.

    A whole model is a directory with config.json and model.safetensors, as `hub train --method full` and `hub merge`
    write it; `hub serve --base REF` serves it.

    --dataset and --metrics add to what loraplex.json records, in the version that is stored; DIRECTORY stays as it is.
    `hub search --metric` and gates ask for these metrics.

    Without --base the base is what loraplex.json or the config says, "unverified" where nobody has hashed it.
    """
    if key_file is not None and not sign:
        raise click.UsageError("--key is for --sign")
    signing_key = _signing_key(key_file) if sign else None
    stated = metric_facts(metrics)
    with open_hub(hub_url) as hub:
        with directory_with(Path(directory), datasets, stated) as source, progress_bar() as progress:
            how: dict[str, Any] = {
                "base": base, "aliases": aliases, "parents": parents, "creator": current_user(), "progress": progress,
            }  # fmt: skip
            if signing_key is None:
                result = hub.push(source, ref, **how)
            else:
                from hub.signing.pushing import push_signed

                result, _ = push_signed(hub, source, AdapterRef.parse(ref), signing_key, **how)
        version = result.version
        held = [alias for alias, state in hub.aliases(version.full_name).items() if state.holds(version.number)]
    if as_json:
        print_json(_json(version_json(version, held), result, signing_key))
        return
    if result.created:
        click.secho(f"pushed {version.text}", bold=True)
    else:
        click.secho(f"{version.text} is this content already; nothing new was stored", bold=True)
    print_pairs(
        {
            "digest": version.digest,
            "weights": lora_text(version),
            "base": base_text(version.manifest.base),
            "size": size_text(sum(entry.bytes for entry in version.manifest.files.values())),
            "aliases": " ".join(f":{alias}" for alias in held),
            "signed by": signing_key.public.id if signing_key is not None else "",
        }
    )
    for warning in result.warnings:
        click.secho(f"warning: {warning}", fg="yellow", err=True)


def _json(version: dict[str, Any], result: PushResult, key: SigningKey | None) -> dict[str, Any]:
    signed = {"signed_by": key.public.id} if key is not None else {}
    return {**version, "created_now": result.created, "warnings": list(result.warnings), **signed}


def _signing_key(file: Path | None) -> SigningKey:
    """The key, read before anything is pushed."""
    from hub.signing import keys

    return keys.read_signing_key(file or keys.default_key_file())
