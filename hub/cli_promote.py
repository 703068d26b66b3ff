"""`hub promote`."""

from __future__ import annotations

from pathlib import Path

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, version_json
from hub.gate import Gate
from hub.opening import open_existing

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    epilog=examples(
        """
hub promote team/sentiment:canary prod --gate gate.toml

gate.toml:
  require = ["f1 >= 0.8", "test.loss < 1.2"]   # numbers it must have
  no_lower = {f1 = 0.01}                       # at most this much below what the alias holds
  no_higher = {"test.loss" = 0}                # at most this much above it
"""
    )
)
@click.argument("ref")
@click.argument("alias")
@click.option("--gate", required=True, type=_FILE, help="Conditions, TOML or JSON.")
@hub_option
@json_option
def promote(ref: str, alias: str, gate: Path, hub_url: str | None, as_json: bool) -> None:
    """Point ALIAS at the version REF names, provided its recorded metrics meet the gate.

    Metrics are what the version was pushed with (`hub show REF`). Refused with every number that fails; refused too
    when the alias moved while the numbers were compared.
    """
    conditions = Gate.read(gate)
    alias = alias.removeprefix(":")
    with open_existing(hub_url) as hub:
        done = hub.promote(ref, alias, conditions)
    if as_json:
        before = done.before.text if done.before else None
        print_json({"alias": alias, "before": before, "passed": list(done.passed), **version_json(done.version)})
        return
    for line in done.passed:
        click.echo(f"  {line}")
    click.echo(f"{done.version.full_name}:{alias} is now {done.version.text}")
