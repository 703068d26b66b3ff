"""`hub import`: from a bundle, or from Hugging Face."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from hub.actor import current_user
from hub.arrivals import Adopted
from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, print_table, printable, progress_bar, version_json
from hub.cli_trust import trust_options
from hub.hugging_face.address import is_address
from hub.opening import open_hub
from hub.refs import LATEST


@click.command(
    "import",
    epilog=examples(
        """
hub import sentiment.bundle
hub import sentiment.bundle --aliases --require-signature --trust release.pub
hub import hf://org/sentiment-lora team/sentiment --base smollm2-135m
hub import hf://org/sentiment-lora@v1.2 team/sentiment --alias prod
"""
    ),
)
@click.argument("source", metavar="FILE|hf://USER/REPO[@REV]")
@click.argument("ref", required=False)
@click.option("--aliases", "with_aliases", is_flag=True, help="FILE: also move the aliases to where they are there.")
@click.option("--renumber", is_flag=True, help="FILE: where a number is taken here, give the version the next one.")
@click.option("--base", metavar="NAME|DIR", help="hf://: the base it was trained on, to check every tensor.")
@click.option("--alias", "named", multiple=True, metavar="ALIAS", help="hf://: also point this alias at it.")
@trust_options
@hub_option
@json_option
def import_(
    source: str,
    ref: str | None,
    with_aliases: bool,
    renumber: bool,
    base: str | None,
    named: tuple[str, ...],
    trusted_keys: tuple[Path, ...],
    hub_url: str | None,
    as_json: bool,
) -> None:
    """Take in versions from a bundle that `hub export` wrote, or an adapter from Hugging Face.

    From FILE, all versions or none: every byte is checked, every adapter is read as in a push. A version keeps its
    digest, its signatures and its number. Where other content has that number here, the import is refused, unless
    --renumber; what is here already stays as it is. :latest follows where the newest version came with the file; other
    aliases only with --aliases.

    From hf:// as the next version of REF. The revision (a branch, tag or commit; main, if not given) is looked up once
    and its commit recorded in the version. Only adapter_config.json, adapter_model.safetensors, README.md and
    loraplex.json are downloaded: no pickle, no code. HF_ENDPOINT, HF_TOKEN and HF_HOME count.
    """
    if is_address(source):
        if ref is None:
            raise click.UsageError("say what it is to be called here: hub import hf://user/repo REF")
        if with_aliases or renumber or trusted_keys:
            raise click.UsageError("--aliases, --renumber and --require-signature are for bundles")
        _from_hugging_face(source, ref, base, named, hub_url, as_json)
        return
    if ref is not None or base is not None or named:
        raise click.UsageError("a bundle's versions have their names: REF, --base and --alias are for hf://")
    _from_bundle(Path(source), with_aliases, renumber, trusted_keys, hub_url, as_json)


def _from_bundle(
    file: Path, with_aliases: bool, renumber: bool, trusted_keys: tuple[Path, ...], hub_url: str | None, as_json: bool
) -> None:
    from hub.bundle import Bundle

    with progress_bar() as progress, Bundle(file, progress) as bundle:
        if trusted_keys:
            _require(bundle.arrivals, trusted_keys)
        with open_hub(hub_url) as hub:
            aliases = bundle.aliases if with_aliases else ()
            adopted = hub.adopt(
                bundle.arrivals, bundle.lay_out, aliases=aliases, renumber=renumber, progress=progress
            )  # fmt: skip
    if as_json:
        print_json([_json(each) for each in adopted])
        return
    print_table(
        ["version", "what", "digest", "signatures"],
        [
            [each.version.text, _what(each), each.version.digest[:19], f"{each.signatures_added} new"]
            for each in adopted
        ],
    )
    for alias in aliases:
        if alias.alias != LATEST:
            click.echo(f"{alias.full_name}:{alias.alias} moved as in the bundle")


def _from_hugging_face(
    source: str, ref: str, base: str | None, named: tuple[str, ...], hub_url: str | None, as_json: bool
) -> None:
    from hub.hugging_face.address import Address
    from hub.hugging_face.fetching import fetch
    from hub.publishing import pushed_aliases
    from hub.refs import AdapterRef

    address = Address.parse(source)
    pushed_aliases(AdapterRef.parse(ref))  # refuses a number before anything is downloaded
    with tempfile.TemporaryDirectory(prefix="loraplex-hf-") as scratch, open_hub(hub_url) as hub:
        with progress_bar() as progress:
            fetched = fetch(address, Path(scratch), progress)
            result = hub.push(
                scratch, ref, base=base, aliases=named, creator=current_user(), progress=progress
            )  # fmt: skip
        version = result.version
    if as_json:
        print_json(
            {
                **version_json(version), "created_now": result.created, "commit": fetched.commit,
                "left_out": list(fetched.left_out), "warnings": list(result.warnings),
            }
        )  # fmt: skip
        return
    happened = "imported" if result.created else "this content was here already:"
    click.secho(f"{happened} {version.text}  ({address.repository} at {fetched.commit[:12]})", bold=True)
    if fetched.left_out:
        names = ", ".join(fetched.left_out[:8]) + (", …" if len(fetched.left_out) > 8 else "")
        click.echo(printable(f"not taken: {names}"), err=True)
    for warning in result.warnings:
        click.secho(f"warning: {warning}", fg="yellow", err=True)


def _require(arrivals: Any, trusted_keys: tuple[Path, ...]) -> None:
    """Check every version's signature before any is taken in."""
    from hub.signing.policy import TrustPolicy
    from hub.versions import Version

    policy = TrustPolicy.read(trusted_keys)
    for arrival in arrivals:
        manifest = arrival.manifest
        policy.check(
            Version(manifest.name, arrival.number, arrival.digest, manifest, manifest.created), arrival.signatures
        )


def _what(each: Adopted) -> str:
    if each.outcome == "imported" and each.number != each.version.number:
        return f"imported, was @{each.number}"
    return {"imported": "imported", "known": "here already", "restored": "restored"}[each.outcome]


def _json(each: Adopted) -> dict[str, Any]:
    return {
        **version_json(each.version), "outcome": each.outcome, "number_there": each.number,
        "signatures_added": each.signatures_added,
    }  # fmt: skip
