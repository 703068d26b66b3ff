"""`hub data check`: what is wrong with a data file, in numbers and in examples."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from hub.cli_options import examples, json_option
from hub.cli_output import print_json, print_table, printable, progress_bar
from training.data import digest_of, read_jsonl
from training.errors import OutputExists
from training.output import check_writable
from training.presets import named_recipe
from training.quiet import quiet_libraries
from training.tasks import MODULES, Answers, task_named
from training.token_counter import token_counter

if TYPE_CHECKING:
    from training.data_report import Finding, Report

_SHOWN_CHARS = 160
_BAR_CHARS = 40
_MOST_LABELS = 20


@click.command(
    epilog=examples(
        """
hub data check mine.jsonl --eval held-out.jsonl
hub data check mine.jsonl --eval held-out.jsonl --fix clean.jsonl
hub data check data/sentiment/train.jsonl --eval data/sentiment/eval.jsonl --json
"""
    )
)
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--eval",
    "evaluation",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="What must not occur in FILE, exactly or nearly.",
)
@click.option("--task", type=click.Choice(list(MODULES)), help="Of which task; a dataset.json beside FILE says it too.")
@click.option(
    "--answers",
    type=click.Choice(get_args(Answers)),
    help="What answers look like; says which checks make sense.  [default: the task's, else guessed]",
)
@click.option(
    "--similarity",
    type=click.FloatRange(0.5, 1.0),
    default=0.9,
    show_default=True,
    help="From where on two questions are nearly equal: shared runs of five characters by all of them.",
)
@click.option(
    "--base",
    default="smollm2-135m",
    show_default=True,
    metavar="NAME|DIR|ORG/NAME[@REV]",
    help="Whose tokenizer and chat template.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=8),
    default=named_recipe("recommended").max_length,
    show_default=True,
    help="Tokens that the recipe trains on at most.",
)
@click.option("--number", type=click.IntRange(min=1), default=3, show_default=True, help="Examples of each finding.")
@click.option(
    "--fix", "fixed", type=click.Path(path_type=Path, dir_okay=False), help="Write FILE without its faults; a new file."
)
@json_option
def check(
    file: Path,
    evaluation: Path | None,
    task: str | None,
    answers: Any,
    similarity: float,
    base: str,
    max_length: int,
    number: int,
    fixed: Path | None,
    as_json: bool,
) -> None:
    """Check a chat JSONL FILE of training examples. Exits 1 when it has faults, unless --fix removes them.

    Faults: lines that are no conversation or one that the chat template of --base refuses, blank messages, exact and
    near duplicates, JSON answers that do not parse (in tasks of JSON answers), answers under 20 tokens (in long-form
    tasks only: a label is short by nature), one question answered differently (where answers are labels or JSON), and
    questions, of any turn, that --eval has too.

    Advice, which fails nothing: nearly equal questions with different answers, unbalanced labels, rare labels that look
    like a misspelled other, examples too long for the recipe, the size of the hold-out. Make the hold-out before you
    clean.
    """
    from training.data_check import check_file, known_answers

    if fixed is not None and fixed.exists():
        raise OutputExists(f"{fixed} is there already; --fix writes a new file")
    if fixed is not None:
        check_writable(fixed)
    quiet_libraries()
    told = task or known_answers(file)
    if answers is None and told in MODULES:
        answers = task_named(told).answers
    with progress_bar("items") as progress:
        report = check_file(
            file,
            token_counter(base),
            answers=answers,
            evaluation=read_jsonl(evaluation).examples if evaluation is not None else None,
            similarity=similarity,
            max_length=max_length,
            samples=number,
            progress=progress,
        )
    written = _write(fixed, report) if fixed is not None else None
    if as_json:
        fix = {"file": str(fixed), "digest": written, "examples": len(report.kept)} if written is not None else None
        print_json({**report.as_json(), "fix": fix})
    else:
        _show(report)
        if written is not None:
            click.echo()
            click.secho(f"{fixed}: {len(report.kept)} examples, {written}", bold=True)
    if not report.ok and written is None:
        sys.exit(1)


def _write(path: Path, report: Report) -> str:
    """The lines that were kept; returns the digest of the new file."""
    data = report.without_faults()
    with path.open("xb") as file:
        file.write(data)
    return digest_of(data)


def _show(report: Report) -> None:
    click.secho(f"{report.file}: {report.lines} lines, {report.digest}", bold=True)
    click.echo(f"judged as a task of {report.answers} answers (--answers says otherwise)")
    for finding in report.faults:
        _show_finding(finding, click.style("fault ", fg="red"))
    for finding in report.advice:
        _show_finding(finding, click.style("advice", fg="yellow"))
    if report.passed:
        click.echo(
            click.style("passed", fg="green") + "  " + ", ".join(name.replace("_", " ") for name in report.passed)
        )
    if report.labels:
        total = sum(report.labels.values())
        shown = list(report.labels.items())[:_MOST_LABELS]
        click.echo()
        rows = [(printable(label), str(count), f"{count / total:.1%}", _bar(count / total)) for label, count in shown]
        print_table(("label", "examples", "share", ""), rows)
        if len(report.labels) > len(shown):
            click.echo(f"and {len(report.labels) - len(shown)} more labels")
    if report.tokens:
        click.echo()
        _show_lengths(report)
    click.echo()
    dropped = report.lines - len(report.kept)
    if report.ok:
        click.secho(f"no faults in {report.lines} examples", fg="green", bold=True)
    else:
        click.secho(f"{dropped} of {report.lines} lines have faults, {len(report.kept)} are sound", fg="red", bold=True)


def _show_finding(finding: Finding, mark: str) -> None:
    click.echo(f"{mark}  {finding.check.replace('_', ' ')}: {finding.count} {finding.message}")
    for sample in finding.samples:
        click.echo(printable(f"          line {sample.line}: {_excerpt(sample.text)}"))
        if sample.other:
            click.echo(printable(f"            ↳ {_excerpt(sample.other)}"))
    if finding.samples and finding.count > len(finding.samples):
        click.echo(f"          … ({finding.count} in all; --number shows more)")


def _show_lengths(report: Report) -> None:
    rows = [
        (
            f"{each.shortest} … {each.longest}",
            str(each.answers),
            str(each.conversations),
            _bar(each.conversations / len(report.tokens)),
        )
        for each in report.histogram
    ]
    print_table(("tokens", "answers", "conversations", ""), rows)


def _bar(share: float) -> str:
    return "█" * round(share * _BAR_CHARS) or ("▏" if share else "")


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARS else line[: _SHOWN_CHARS - 1] + "…"
