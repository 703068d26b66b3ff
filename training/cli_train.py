"""`hub train`. Torch is imported only when the run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json
from server.cli import bound_openmp
from training.presets import RECIPES, named_recipe
from training.quiet import quiet_libraries
from training.recipe import INITS, PRECISIONS, SCHEDULES, VARIANTS

_METHODS = ("lora", "qlora", "full")
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
_TARGET = click.Path(path_type=Path, dir_okay=False)


def _recipes() -> str:
    return f"Recipes: {', '.join(RECIPES)}. `hub recipes` compares them, `hub recipes show NAME` prints one."


def _targets(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """`all`, or module names with commas; None where the option is not given."""
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise click.BadParameter("give module names with commas, or all")
    return () if names == ("all",) else names


@click.command(
    epilog=_recipes()
    + "\n\n"
    + examples(
        """
hub train data/sentiment/train.jsonl --out out/sentiment --recipe demo
hub train mine.jsonl --base org/name@rev --method qlora --rank 32 --out out/mine --push team/mine
hub train mine.jsonl --out out/mine --resume
hub train mine.jsonl --method full --out out/whole --extract-rank 64 --push team/mine-whole
"""
    )
)
@click.argument("data", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--base", default="smollm2-135m", show_default=True, metavar="NAME|DIR|REF|ORG/NAME[@REV]")
@click.option(
    "--method",
    type=click.Choice(_METHODS),
    help="An adapter; one on the NF4 base; or every weight, which writes a whole model.  [default: the recipe's]",
)
@click.option("--recipe", type=click.Choice(list(RECIPES)), default="recommended", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write; must not exist.")
@click.option("--push", "ref", metavar="REF", help="Push what was made to the hub when done.")
@click.option("--rank", type=int, help="Override the recipe; so do the options below.")
@click.option("--alpha", type=int, help="Scale of the adapter is alpha / rank.")
@click.option("--dropout", type=float)
@click.option("--learning-rate", type=float, help="Recipes give adapters' rates; --method full takes a tenth of them.")
@click.option("--targets", callback=_targets, help="Modules to adapt: q_proj,v_proj or all (every linear).")
@click.option("--variant", type=click.Choice(VARIANTS), help="rslora scales by alpha / sqrt(rank); dora is slower.")
@click.option(
    "--init", type=click.Choice(INITS), help="qera, with --method qlora: begin with what NF4 took off the base."
)
@click.option("--schedule", type=click.Choice(SCHEDULES), help="How the rate falls.")
@click.option("--warmup", type=float, help="Fraction of all steps in which the rate rises.")
@click.option("--weight-decay", type=float)
@click.option("--clip", type=float, help="Largest norm of the gradient.")
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=None,
    help="Compute activations twice instead of keeping them.",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Of the products; weights that train are float32. auto: bfloat16 where the processor or GPU multiplies it.",
)
@click.option("--epochs", type=float)
@click.option("--batch", type=int, help="Sequences in one forward.")
@click.option("--accumulation", type=int, help="Forwards in one step.")
@click.option("--max-length", type=int, help="Tokens; longer examples are left out.")
@click.option("--hold-out", type=float, help="Fraction of the data kept for the validation loss.")
@click.option("--seed", type=int)
@click.option("--max-steps", type=click.IntRange(min=1), help="Stop after this many steps.")
@click.option("--checkpoint-steps", type=click.IntRange(min=1), default=50, show_default=True)
@click.option("--validation-steps", type=click.IntRange(min=1), help="Between validation losses.  [default: one pass]")
@click.option(
    "--early-stop",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Stop after N validation losses in a row without a new lowest, and keep the weights of the lowest.",
)
@click.option("--skill-data", type=_FILE, help="Chat JSONL of what the model should stay able to do, mixed in.")
@click.option(
    "--skill-share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Of all training examples, how many are from --skill-data.",
)
@click.option(
    "--extract-rank",
    type=click.IntRange(min=1, max=4096),
    metavar="R",
    help="With --method full: also write OUT-rR, the LoRA of rank R nearest to what changed, and how near that is.",
)
@click.option("--curves", type=_TARGET, multiple=True, metavar="FILE", help="Draw the losses: .png, .svg or .json.")
@click.option("--tensorboard", type=click.Path(path_type=Path, file_okay=False), help="Directory for event files.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoints in OUT.checkpoints.")
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads.  [default: all cores]")
@hub_option
@json_option
def train(
    data: Path,
    base: str,
    method: Any,
    recipe: str,
    out: Path,
    ref: str | None,
    max_steps: int | None,
    checkpoint_steps: int,
    resume: bool,
    validation_steps: int | None,
    early_stop: int,
    skill_data: Path | None,
    skill_share: float,
    extract_rank: int | None,
    curves: tuple[Path, ...],
    tensorboard: Path | None,
    threads: int,
    hub_url: str | None,
    as_json: bool,
    **overrides: Any,
) -> None:
    """Train on DATA, chat JSONL: {"messages": [{"role": …, "content": …}, …]} a line, the last one the assistant's.

    Only the assistant's tokens are trained. A part of the examples is held out first and used for the validation loss
    before and after. OUT becomes a standard PEFT directory with loraplex.json, the facts of the run.
    """
    named = named_recipe(recipe)
    method = method or named.method
    if extract_rank is not None and method != "full":
        raise click.UsageError("--extract-rank needs --method full")
    chosen = (named.for_every_weight() if method == "full" else named.but(method=method)).but(**overrides)
    bound_openmp(threads)
    quiet_libraries()
    from hub.base import base_identity, locate_base
    from hub.model_base import find_base
    from hub.publishing import pushed_aliases
    from hub.refs import AdapterRef
    from training import output
    from training.finetune import Plan
    from training.finetune import train as run
    from training.processes import threads_here
    from training.skills import SkillData

    output.check_free(out)
    extracted = output.beside(out, f"-r{extract_rank}") if extract_rank is not None else None
    if extracted is not None:
        output.check_free(extracted)
    if ref is not None:
        pushed_aliases(AdapterRef.parse(ref))  # refuses now what the push would refuse after all the work
    base = find_base(base, hub_url)
    located = locate_base(base)
    identity, _ = base_identity(base)
    outcome = run(
        Plan(
            data=data,
            base=identity,
            base_directory=located.directory,
            recipe=chosen,
            out=out,
            method=method,
            max_steps=max_steps,
            resume=resume,
            threads=threads or threads_here(),
            checkpoint_steps=checkpoint_steps,
            validation_steps=validation_steps,
            early_stop=early_stop,
            skills=SkillData(skill_data, skill_share) if skill_data is not None else None,
            tensorboard=tensorboard,
            curves=curves,
        )
    )
    if not outcome.written:  # the first process does the rest
        return
    made = None
    if extracted is not None and extract_rank is not None:
        from training.cli_extract import show, write_extracted

        made = write_extracted(located.directory, out, identity, extract_rank, extracted)
        show(made, extracted)
    pushed = _push(out, ref, base, hub_url) if ref is not None else None
    if as_json:
        facts = outcome.facts
        told = {"out": str(out), "pushed": pushed, "metrics": facts.metrics, "datasets": facts.datasets}
        print_json(told | ({"extracted": {"out": str(extracted), **made.as_dict()}} if made is not None else {}))


def _push(out: Path, ref: str, base: str, hub_url: str | None) -> str:
    from hub.opening import open_hub

    with open_hub(hub_url) as hub:
        version = hub.push(out, ref, base=base).version
    click.secho(f"pushed {version.text}", bold=True, err=True)
    return version.text
