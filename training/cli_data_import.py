"""`hub data import`: one's own table as training and evaluation files."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hub.cli_options import examples, json_option
from hub.cli_output import print_json
from training.build import CARD
from training.csv_import import UTF8, Wording, read_table
from training.data import read_jsonl, write_jsonl
from training.errors import OutputExists
from training.hold_out import hold_out


def _character(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """One character; a tab is also written \\t."""
    if value is None or value == "\\t":
        return value and "\t"
    if len(value) != 1 or value in '"\r\n':
        raise click.BadParameter("give one character, \\t for a tab")
    return value


@click.command(
    "import",
    epilog=examples(
        """
hub data import tickets.csv --question text --answer queue --out data/tickets
hub data import tickets.csv --question "{subject}: {text}" --answer queue --system "Name the queue." --out data/tickets
hub data import tickets.csv --delimiter ";" --encoding cp1252 --question text --answer queue --out data/x
hub data import mine.jsonl --out data/mine
"""
    ),
)
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--question", metavar="COLUMN|TEXT", help="A column, or a text with columns in braces. Not for JSONL.")
@click.option("--answer", metavar="COLUMN", help="The column with what is wanted. Not for JSONL.")
@click.option("--system", metavar="TEXT", help="An instruction put before every question. Not for JSONL.")
@click.option(
    "--delimiter",
    callback=_character,
    metavar="CHARACTER",
    help="Between fields.  [default: tab in a .tsv, else comma]",
)
@click.option("--encoding", metavar="NAME", help="Of the table, such as cp1252.  [default: UTF-8]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory to write.")
@click.option(
    "--eval-share",
    type=click.FloatRange(0, 0.5, min_open=True),
    default=0.1,
    show_default=True,
    help="Of the examples, how many are put aside for `hub eval`.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which are put aside.")
@json_option
def import_table(
    file: Path, question: str | None, answer: str | None, system: str | None, delimiter: str | None,
    encoding: str | None, out: Path, eval_share: float, seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Make OUT/train.jsonl and OUT/eval.jsonl of FILE: a CSV or TSV whose first row names the columns, or chat JSONL.

    One question is never on both sides, however often it occurs and at whatever turn, and the evaluation set is put
    aside before anything is cleaned. OUT/dataset.json records the digests.
    """
    for name in ("train.jsonl", "eval.jsonl", CARD):
        if (out / name).exists():
            raise OutputExists(f"{out / name} is there already; choose another --out or remove it")
    if file.suffix.lower() in (".jsonl", ".json"):
        if question or answer or system or delimiter or encoding:
            raise click.UsageError(
                "--question, --answer, --system, --delimiter and --encoding are for tables; JSONL has its conversations"
            )
        found = read_jsonl(file).examples
    else:
        if question is None or answer is None:
            raise click.UsageError("a table needs --question and --answer")
        found = read_table(file, Wording(question, answer, system), delimiter, encoding or UTF8)
    train, evaluation = hold_out(found, eval_share, seed)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        name: {"examples": len(side), "digest": write_jsonl(out / name, side)}
        for name, side in (("train.jsonl", train), ("eval.jsonl", evaluation))
    }
    card = {"task": None, "seed": seed, "files": files, "provenance": f"imported from {file.name}", "licence": None}
    (out / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", "utf-8")
    if as_json:
        print_json(card)
    else:
        click.echo(f"{out}: {len(train)} examples to train on, {len(evaluation)} put aside in eval.jsonl")
