"""`hub promote`."""

from __future__ import annotations

from pathlib import Path

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, version_json
from hub.facade import HubFacade
from hub.gate import Gate
from hub.gate_evaluation import Scores, find_evaluator
from hub.opening import open_existing
from hub.versions import Version

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(
    epilog=examples(
        """
hub promote team/sentiment:canary prod --gate gate.toml

gate.toml:
  require = ["f1 >= 0.8", "test.loss < 1.2"]   # numbers it must have
  # "sentiment.accuracy >= 0.7": what `hub eval --task sentiment --record` found
  no_lower = {f1 = 0.01}                       # at most this much below what the alias holds
  no_higher = {"test.loss" = 0}                # at most this much above it

  [evaluate]                                   # measure now, instead of reading what was recorded
  task = "sentiment"                           # as `hub eval --task`
  data = "eval.jsonl"                          # beside this file
  limit = 200
"""
    )
)
@click.argument("ref")
@click.argument("alias")
@click.option("--gate", required=True, type=_FILE, help="Conditions, TOML or JSON.")
@hub_option
@json_option
def promote(ref: str, alias: str, gate: Path, hub_url: str | None, as_json: bool) -> None:
    """Point ALIAS at the version REF names, provided its metrics meet the gate.

    Metrics are what the version was pushed with, what `hub eval --record` added as TASK.METRIC (`hub show REF` has
    both; two versions are compared by the same questions on the same base alone), or, where the gate names an
    evaluation, what that measures now: of the version, and of what the alias holds where the gate compares the two.
    Refused with every number that fails; refused too when the alias moved while the numbers were measured or compared.
    """
    conditions = Gate.read(gate)
    alias = alias.removeprefix(":")
    with open_existing(hub_url) as hub:
        version, scores = hub.resolve(ref), None
        if conditions.evaluation is not None:
            scores = _measure(hub, version, alias, conditions, hub_url)
        exact = f"{version.full_name}@{version.digest}"
        done = hub.promote(exact if scores is not None else ref, alias, conditions, scores)
    if as_json:
        before = done.before.text if done.before else None
        measured = {"measured": dict(scores.candidate), "evaluation": scores.source} if scores else {}
        print_json(
            {"alias": alias, "before": before, "passed": list(done.passed), **measured, **version_json(done.version)}
        )
        return
    for line in done.passed:
        click.echo(f"  {line}")
    if scores is not None:
        click.echo(f"  measured: {scores.source}")
    click.echo(f"{done.version.full_name}:{alias} is now {done.version.text}")


def _measure(hub: HubFacade, version: Version, alias: str, gate: Gate, hub_url: str | None) -> Scores:
    """Run the gate's evaluation on the version, and on what the alias holds where the gate compares them."""
    assert gate.evaluation is not None
    evaluate = find_evaluator()
    compares = bool(gate.no_lower or gate.no_higher)
    held = hub.aliases(version.full_name).get(alias) if compares else None
    refs = [f"{version.full_name}@{digest}" for digest in (version.digest, *([held.digest] if held else []))]
    distinct = list(dict.fromkeys(refs))
    click.echo(f"measuring {version.text}{' and what the alias holds' if held else ''}", err=True)
    measured = evaluate(gate.evaluation, distinct, hub_url)
    by_ref = dict(zip(distinct, measured.scores, strict=True))
    current = by_ref[refs[1]] if held else {}
    return Scores(by_ref[refs[0]], current, held.digest if held else None, measured.source)
