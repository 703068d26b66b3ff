"""`hub show`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from hub import model_dir
from hub.adapter_dir import CONFIG_FILE, README_FILE
from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import (
    base_text,
    holder_text,
    lora_text,
    print_json,
    print_pairs,
    print_table,
    printable,
    share_text,
    size_text,
    time_text,
    version_json,
)
from hub.errors import EvaluationsUnsupported
from hub.evaluation import Evaluation
from hub.facade import HubFacade
from hub.hub import Version
from hub.lineage import Lineage
from hub.opening import open_existing


@click.command(
    epilog=examples(
        """
hub show team/sentiment
hub show team/sentiment:prod --json | jq .manifest.metrics
hub show team/sentiment@3 --lineage
hub show team/sentiment@3 --card --config
"""
    )
)
@click.argument("ref")
@click.option("--card", is_flag=True, help="Its README.md.")
@click.option("--lineage", is_flag=True, help="What it was made from, back to the first, and what was made from it.")
@click.option("--config", is_flag=True, help="Its adapter_config.json; a model's config.json.")
@hub_option
@json_option
def show(ref: str, card: bool, lineage: bool, config: bool, hub_url: str | None, as_json: bool) -> None:
    """Everything about the version REF names: weights, base, how it was trained, files, aliases, pins and leases.

    With --card, --lineage or --config only that. Where an alias is split over versions, the heaviest is shown.
    """
    with open_existing(hub_url) as hub:
        version = hub.resolve(ref)
        states = hub.aliases(version.full_name)
        parents = [_known_as(hub, parent) for parent in version.manifest.parents]
        family = hub.lineage(f"{version.full_name}@{version.digest}") if lineage else None
        files = version.manifest.files
        leases = [lease for lease in hub.leases(version.full_name) if lease.version == version.number]
        text = hub.read_file(version, README_FILE).decode("utf-8", "replace") if card and README_FILE in files else None
        named = CONFIG_FILE if version.manifest.kind == "adapter" else model_dir.CONFIG_FILE
        settings = json.loads(hub.read_file(version, named)) if config else None
        scored = _evaluations(hub, version)
    held = {alias: state for alias, state in states.items() if state.holds(version.number)}
    if as_json:
        value = version_json(version, list(held))
        value |= {"evaluations": [vars(each) for each in scored], "leases": [asdict(lease) for lease in leases]}
        value |= {"card": text} if card else {}
        value |= {"lineage": _lineage_json(family)} if family is not None else {}
        value |= {"config": settings} if config else {}
        print_json(value)
        return
    if card:
        # A card is many lines of a stranger's.
        lines = text.splitlines() if text is not None else [f"{version.text} has no {README_FILE}"]
        click.echo("\n".join(map(printable, lines)))
    if settings is not None:
        click.echo(json.dumps(settings, indent=2))
    if family is not None:
        _print_lineage(family)
    if not (card or config or lineage):
        aliases = " ".join(f":{alias}{share_text(state, version.number)}" for alias, state in held.items())
        _print_all(version, aliases, ", ".join(map(holder_text, leases)), parents)
        for each in scored:
            click.secho(printable(f"evaluation: {each.task}, {each.at}"), bold=True)
            print_pairs(_flat(each.metrics))


def _evaluations(hub: HubFacade, version: Version) -> list[Evaluation]:
    try:
        return hub.evaluations(version.digest)
    except EvaluationsUnsupported:
        return []  # a server of an older release: everything else can be shown


def _print_all(version: Version, aliases: str, holders: str, parents: list[str]) -> None:
    manifest = version.manifest
    click.secho(version.text, bold=True)
    print_pairs(
        {
            "digest": version.digest,
            "created": f"{version.created}{f' by {manifest.creator}' if manifest.creator else ''}",
            "aliases": aliases,
            "held by": holders,
            "base": base_text(manifest.base),
            "weights": lora_text(version),
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


def _print_lineage(family: Lineage) -> None:
    rows = [
        [str(-step.distance), step.version.text if step.version else step.digest, _brief(step.version)]
        for step in reversed(family.ancestors)
    ]
    rows.append(["0", family.version.text, _brief(family.version)])
    rows += [["+1", child.text, _brief(child)] for child in family.children]
    print_table(["step", "version", "made"], rows)
    if not family.complete:
        click.echo("older ancestors are left out", err=True)


def _brief(version: Version | None) -> str:
    if version is None:
        return "not in this hub any more"
    by = f" by {version.manifest.creator}" if version.manifest.creator else ""
    return f"{time_text(version.created)}{by}"


def _lineage_json(family: Lineage) -> dict[str, Any]:
    return {
        "ancestors": [
            {
                "digest": step.digest,
                "version": step.version.text if step.version else None,
                "distance": step.distance,
                "through": list(step.children),
            }
            for step in family.ancestors
        ],
        "children": [{"digest": child.digest, "version": child.text} for child in family.children],
        "complete": family.complete,
    }


def _known_as(hub: HubFacade, digest: Any) -> str:
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
