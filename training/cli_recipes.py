"""`hub recipes`: the named recipes, and every number of one."""

from __future__ import annotations

from dataclasses import fields

import click

from hub.cli_options import examples, json_option
from hub.cli_output import print_json, print_pairs, print_table
from training.presets import ARTICLES, RECIPES, named_recipe
from training.recipe import Recipe

_WORDS = ("name", "source", "when")


@click.group(
    invoke_without_command=True,
    epilog=examples(
        """
hub recipes
hub recipes show low-data
hub train mine.jsonl --recipe low-data --rank 16 --out out/mine   # every number can be overridden
"""
    ),
)
@json_option
@click.pass_context
def recipes(context: click.Context, as_json: bool) -> None:
    """The recipes of `hub train --recipe`, in one table; `show NAME` prints one whole."""
    if context.invoked_subcommand is not None:
        return
    if as_json:
        print_json([recipe.as_dict() for recipe in RECIPES.values()])
        return
    rows = [
        (
            recipe.name,
            recipe.method,
            f"{recipe.rank}/{recipe.alpha}",
            targets_text(recipe),
            f"{recipe.learning_rate:g}",
            f"{recipe.epochs:g}",
            f"{recipe.batch} × {recipe.accumulation}",
            str(recipe.max_length),
            recipe.when,
        )
        for recipe in RECIPES.values()
    ]
    print_table(("recipe", "method", "r/α", "targets", "rate", "epochs", "batch", "tokens", "when to use"), rows)
    click.echo(f"\n{ARTICLES}")


@recipes.command()
@click.argument("name", metavar="NAME")
@json_option
def show(name: str, as_json: bool) -> None:
    """Every number of the recipe NAME, where it comes from and when to use it."""
    recipe = named_recipe(name)
    if as_json:
        print_json(recipe.as_dict())
        return
    click.secho(recipe.name, bold=True)
    click.echo(f"  {recipe.when}\n  from: {recipe.source}\n")
    pairs = {}
    for field in fields(Recipe):
        if field.name not in _WORDS:
            value = getattr(recipe, field.name)
            option = f"--{field.name.replace('_', '-')}"
            pairs[option] = targets_text(recipe) if field.name == "targets" else _shown(value)
    print_pairs(pairs)


def targets_text(recipe: Recipe) -> str:
    """The target modules in a word or two."""
    return " ".join(target.removesuffix("_proj") for target in recipe.targets) or "all linears"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
