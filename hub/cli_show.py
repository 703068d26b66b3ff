"""`hub list` and `hub show`."""

from __future__ import annotations

import json
from typing import Any

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import (
    base_text,
    lora_text,
    print_json,
    print_pairs,
    print_table,
    rank_text,
    size_text,
    version_json,
)
from hub.hub import Hub, Version


@click.command(
    "list",
    epilog=examples(
        """
hub list
hub list 'team/*'
hub list team/sentiment --all
"""
    ),
)
@click.argument("pattern", required=False)
@click.option("--all", "every", is_flag=True, help="Every version, not only the newest of each adapter.")
@hub_option
@json_option
def list_versions(pattern: str | None, every: bool, hub_url: str | None, as_json: bool) -> None:
    """List adapters, each with its newest version. PATTERN is a shell pattern for names ('team/*')."""
    with Hub.open(hub_url) as hub:
        found = hub.versions(pattern)
        versions = found if every else list({version.full_name: version for version in found}.values())
        aliases = {name: hub.aliases(name) for name in {version.full_name for version in versions}}
    held = {
        version.text: [alias for alias, state in aliases[version.full_name].items() if state.version == version.number]
        for version in versions
    }
    if as_json:
        print_json([version_json(version, held[version.text]) for version in versions])
        return
    if not versions:
        click.echo(f"no adapter matches {pattern!r}" if pattern else "the hub is empty: `hub push DIR NAME` fills it")
        return
    print_table(
        ["version", "aliases", "rank", "parameters", "base", "created"],
        [
            [
                version.text,
                " ".join(held[version.text]),
                rank_text(version),
                f"{version.manifest.lora.parameters:,}",
                version.manifest.base.name or "unknown",
                version.created.replace("T", " ").removesuffix("Z"),
            ]
            for version in versions
        ],
    )


@click.command(
    epilog=examples(
        """
hub show team/sentiment
hub show team/sentiment:prod --json | jq .manifest.metrics
"""
    )
)
@click.argument("ref")
@hub_option
@json_option
def show(ref: str, hub_url: str | None, as_json: bool) -> None:
    """Everything about the version REF names: weights, base, how it was trained, files, aliases."""
    with Hub.open(hub_url) as hub:
        version = hub.resolve(ref)
        states = hub.aliases(version.full_name)
        parents = [_known_as(hub, parent) for parent in version.manifest.parents]
    held = [alias for alias, state in states.items() if state.version == version.number]
    if as_json:
        print_json(version_json(version, held))
        return
    manifest = version.manifest
    click.secho(version.text, bold=True)
    print_pairs(
        {
            "digest": version.digest,
            "created": f"{version.created}{f' by {manifest.creator}' if manifest.creator else ''}",
            "aliases": " ".join(f":{alias}" for alias in held),
            "base": base_text(manifest.base),
            "lora": lora_text(version),
            "note": "its delta is zero everywhere: base output, always" if manifest.lora.changes_nothing else "",
            "parents": ", ".join(parents),
        }
    )
    for heading in ("metrics", "recipe", "datasets", "seeds"):
        if facts := getattr(manifest, heading):
            click.secho(heading, bold=True)
            print_pairs(_flat(facts))
    click.echo()
    print_table(
        ["file", "size", "sha256"],
        [[name, size_text(entry.bytes), entry.sha256.hex] for name, entry in manifest.files.items()],
    )


def _known_as(hub: Hub, digest: Any) -> str:
    from hub.errors import NotFound

    try:
        parent: Version = hub.get(digest)
    except NotFound:
        return str(digest)
    return parent.text


def _flat(facts: Any) -> dict[str, str]:
    """Facts as lines: an object's keys, a list's positions."""
    items = facts.items() if isinstance(facts, dict) else enumerate(facts, start=1)
    return {str(key): _value(value) for key, value in items}


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
