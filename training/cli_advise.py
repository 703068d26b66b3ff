"""`hub advise`: what each way to train would take, and which one to take."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub.cli_options import examples, json_option
from hub.cli_output import print_json, print_table
from server.cli import bound_openmp
from training.presets import ARTICLES, RECIPES, named_recipe
from training.quiet import quiet_libraries
from training.recipe import PRECISIONS

if TYPE_CHECKING:
    from training.advice import Verdict
    from training.planner import Data, Machine, Option
    from training.recipe import Recipe

_GPU_NAMES = ("t4", "l4", "rtx-4090", "a100-40", "a100", "h100", "h200")
_GOALS = ("format", "style", "classification", "knowledge", "reasoning", "latency", "cost")


class _Gigabytes(click.ParamType[int]):
    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """`24GB` or `24` as bytes."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:GB|G)?", value, re.IGNORECASE)
        if found is None or float(found[1]) <= 0:
            self.fail(f"{value!r} is no size; write 24GB", param, ctx)
        return int(float(found[1]) * 1e9)


@click.command(
    epilog=examples(
        """
hub advise --data mine.jsonl
hub advise --base ./Llama-3.1-8B --data mine.jsonl --gpu-memory 24GB --gpu l4 --price-per-hour 0.80
"""
    )
)
@click.option("--base", default="smollm2-135m", show_default=True, metavar="NAME|DIR|ORG/NAME[@REV]")
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Chat JSONL.")
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="recommended", show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), help="As in hub train.  [default: the recipe's]")
@click.option("--gpu", type=click.Choice(_GPU_NAMES), help="Plan for this GPU.  [default: this machine's CPU]")
@click.option(
    "--gpu-memory", type=_Gigabytes(), help="24GB: plan for a GPU of this size; speed is --gpu's, or an a100's."
)
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Of the machine, in your currency.")
@click.option("--goal", type=click.Choice(_GOALS), help="What the adapter should learn, or what it is to save.")
@click.option("--critical", is_flag=True, help="A wrong answer costs much.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads.  [default: all cores]")
@json_option
def advise(
    base: str,
    data: Path,
    recipe: str,
    precision: str | None,
    gpu: str | None,
    gpu_memory: int | None,
    price_per_hour: float | None,
    goal: str | None,
    critical: bool,
    threads: int,
    as_json: bool,
) -> None:
    """Predict memory, time and cost of full fine-tuning, LoRA and QLoRA on DATA, and say which to take and why.

    The base needs only its config.json and tokenizer. Memory comes from a rehearsal: the real model, adapter and
    backward pass on tensors without data. Time is its operations over the speed at which a layer of the base is
    trained here, or an assumed share of a GPU's: for comparing methods, not for a deadline.
    """
    bound_openmp(threads)
    quiet_libraries()
    import torch

    from hub.base import locate_base
    from training import advice, machines
    from training.planner import read_data, weigh

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    chosen = named_recipe(recipe).but(precision=precision)
    if chosen.precision == "float32" and (gpu or gpu_memory):
        raise click.UsageError("of GPUs only the speed in bfloat16 is known here; leave --precision out")
    directory = locate_base(base).directory
    sizes = read_data(data, directory, chosen)
    if gpu is None and gpu_memory is None:
        machine = machines.this_machine(directory, None, chosen.precision)
    else:
        machine = machines.gpu(gpu or "a100", gpu_memory)
    options = weigh(directory, chosen, sizes, machine, price_per_hour)
    verdict = advice.advise(sizes, options, goal, critical)
    if as_json:
        print_json(_as_json(base, sizes, machine, options, verdict))
    else:
        _show(base, chosen, sizes, machine, options, verdict)


def _as_json(base: str, sizes: Data, machine: Machine, options: list[Option], verdict: Verdict) -> dict[str, Any]:
    return {
        "base": base,
        "data": asdict(sizes),
        "machine": {**asdict(machine), "dtype": str(machine.dtype).removeprefix("torch."), "usable": machine.usable},
        "options": [{**asdict(option), "activations": option.rehearsal.activations} for option in options],
        "choice": None
        if verdict.choice is None
        else {"method": verdict.choice.method, "checkpointing": verdict.choice.checkpointing},
        "advice": verdict.first,
        "reasons": [asdict(reason) for reason in verdict.reasons],
    }


def _show(base: str, recipe: Recipe, sizes: Data, machine: Machine, options: list[Option], verdict: Verdict) -> None:
    longest = sizes.longest
    click.secho(f"{base} on {sizes.examples:,} examples ({sizes.tokens:,} tokens a pass), {machine.name}", bold=True)
    click.echo(
        f"recipe {recipe.name}: {recipe.epochs:g} passes, largest batch {longest.rows} × {longest.length} tokens; "
        f"{machine.memory / 1e9:.0f} GB, of which a run may take {machine.usable / 1e9:.1f}\n"
    )
    columns = ["", "method", "checkpointing", "weights", "optimizer", "activations, gradients", "peak", "time"]
    priced = any(option.cost is not None for option in options)
    rows = []
    for option in options:
        told = option.rehearsal
        row = [
            "→" if option is verdict.choice else "" if option.fits else "✗",
            option.method,
            "yes" if option.checkpointing else "no",
            *(_gigabytes(size) for size in (told.weights, told.optimizer, told.activations, option.memory)),
            _duration(option.seconds),
        ]
        rows.append([*row, f"{option.cost:,.2f}"] if priced and option.cost is not None else row)
    print_table([*columns, "cost"] if priced else columns, rows)
    click.secho(f"\n{verdict.first}", bold=True)
    for reason in verdict.reasons:
        towards = f"  → {reason.speaks_for}" if reason.speaks_for else ""
        click.echo(f"  · {reason.text} ({reason.source}){towards}")
    if any("article" in reason.source for reason in verdict.reasons):
        click.echo(f"\n{ARTICLES}")


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
