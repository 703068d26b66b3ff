"""`hub data`: building data sets and looking at them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import click

from hub.cli_options import examples, json_option
from hub.cli_output import print_json, print_table, printable
from training.build import BuiltFiles, build_task, check_own
from training.cli_data_check import check
from training.cli_data_import import import_table
from training.data import Dataset, read_jsonl
from training.tasks import MODULES

_SHOWN_CHARS = 400


@click.group()
def data() -> None:
    """Data sets: chat JSONL, one conversation a line."""


@data.command(
    epilog=examples(
        """
hub data build sentiment --out data/sentiment
hub data build iam-policy --out data/iam --train 2000 --eval 300 --seed 7
"""
    )
)
@click.argument("task", type=click.Choice(list(MODULES)))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory to write.")
@click.option("--train", "train_count", type=click.IntRange(min=1), default=600, show_default=True, help="Examples.")
@click.option("--eval", "eval_count", type=click.IntRange(min=1), default=150, show_default=True, help="Examples.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which examples, which split.")
@json_option
def build(task: str, out: Path, train_count: int, eval_count: int, seed: int, as_json: bool) -> None:
    """Write OUT/train.jsonl, OUT/eval.jsonl and OUT/dataset.json (digests, counts, provenance, licence).

    The examples come from what packages ship; equal arguments and package versions give equal files. Training and
    evaluation share no question, and nothing that the task groups questions by: a document, an action, an operation.
    Some tasks write further evaluation files to be reported apart. Files of an earlier build of TASK are replaced.
    """
    check_own(task, out)
    built = build_task(task, out, train_count, eval_count, seed)
    if as_json:
        print_json(built.card)
        return
    _show_files(out, built)
    _show_example(read_jsonl(out / "train.jsonl"))


data.add_command(check)
data.add_command(import_table)


@data.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--number", type=click.IntRange(min=1), default=3, show_default=True, help="Examples to print.")
@json_option
def show(file: Path, number: int, as_json: bool) -> None:
    """Check a chat JSONL FILE and print its size, digest and first examples."""
    dataset = read_jsonl(file)
    shown = dataset.examples[:number]
    if as_json:
        lines = [json.loads(example.as_line()) for example in shown]
        print_json({"file": str(file), "examples": len(dataset), "digest": dataset.digest, "first": lines})
        return
    click.secho(f"{file}: {len(dataset)} examples, {dataset.digest}", bold=True)
    for index in range(len(shown)):
        _show_example(dataset, index)


def _show_files(out: Path, built: BuiltFiles) -> None:
    click.secho(f"{built.card['task']}: {built.title}", bold=True)
    rows = []
    for name, entry in built.card["files"].items():
        dataset = read_jsonl(out / name)
        rows.append((name, str(entry["examples"]), _answers(dataset), entry["digest"][:19]))
    print_table(("file", "examples", "answers", "digest"), rows)
    click.echo(f"from {built.card['provenance']}; {built.card['licence']}")


def _answers(dataset: Dataset) -> str:
    """The classes and their shares where there are few, else the mean length."""
    counts: Mapping[str, int] = Counter(example.answer for example in dataset.examples)
    if len(counts) <= 6:
        return ", ".join(f"{label} {count}" for label, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{sum(len(example.answer) for example in dataset.examples) / len(dataset):.0f} characters on average"


def _show_example(dataset: Dataset, index: int = 0) -> None:
    click.echo()
    for message in dataset.examples[index].messages:
        text = message.content if len(message.content) <= _SHOWN_CHARS else message.content[:_SHOWN_CHARS] + " …"
        lines = "\n             ".join(printable(line) for line in text.split("\n"))
        click.echo(click.style(f"  {message.role:>9}  ", fg="cyan") + lines)
