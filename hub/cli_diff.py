"""`hub diff`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, print_table
from hub.opening import open_existing
from hub.tensor_names import PREFIX

_SHOWN_TENSORS = 20


@click.command(
    epilog=examples(
        """
hub diff team/sentiment@1 team/sentiment@2
hub diff team/sentiment:prod team/sentiment --tensors
hub diff team/sentiment@1 other/sentiment@7 --json | jq .metrics
"""
    )
)
@click.argument("a")
@click.argument("b")
@click.option("--tensors", is_flag=True, help=f"Every tensor and module that differs, not only {_SHOWN_TENSORS}.")
@hub_option
@json_option
def diff(a: str, b: str, tensors: bool, hub_url: str | None, as_json: bool) -> None:
    """How the version B names differs from the one A names: config, base, metrics, recipe, data, lineage, weights.

    For each tensor its norms, the cosine between both and the norm of the change; for each LoRA module the same of
    scaling*B*A, what it really adds, since equal products can be written in different factors.
    """
    with open_existing(hub_url) as hub:
        found = hub.diff(a, b)
    if as_json:
        value = {key: asdict(found)[key] for key in asdict(found) if key not in ("a", "b")}
        print_json({"a": found.a.text, "b": found.b.text, **value})
        return
    click.secho(f"{found.a.text} -> {found.b.text}", bold=True)
    click.echo(f"  {found.relation}")
    for heading in ("config", "base", "metrics", "recipe", "datasets"):
        _print_changes(heading, getattr(found, heading))
    click.secho("weights", bold=True)
    click.echo(f"  {found.same_tensors} tensors are the same bytes, {len(found.tensors)} differ")
    shown = slice(None if tensors else _SHOWN_TENSORS)
    if found.deltas:
        rows = [[d.module, _number(d.norm_a), _number(d.norm_b), _number(d.cosine)] for d in found.deltas[shown]]
        print_table(["module: scaling*B*A", "|A|", "|B|", "cosine"], rows)
    if found.tensors:
        print_table(
            ["tensor", "|A|", "|B|", "cosine", "|B-A|"],
            [
                [
                    t.name.removeprefix(PREFIX).removesuffix(".weight"),
                    *map(_number, (t.norm_a, t.norm_b, t.cosine, t.change)),
                ]
                for t in found.tensors[shown]
            ],
        )
    left_out = max(len(found.tensors), len(found.deltas)) - _SHOWN_TENSORS
    if left_out > 0 and not tensors:
        click.echo(f"{left_out} more with --tensors", err=True)


def _print_changes(heading: str, changes: Mapping[str, tuple[Any, Any]]) -> None:
    if changes:
        click.secho(heading, bold=True)
        print_table(["key", "A", "B"], [[key, _value(a), _value(b)] for key, (a, b) in changes.items()])


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
