"""`hub continual collect`: what callers marked, as data for the next stage."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import click

from hub.cli_options import examples, json_option
from hub.cli_output import print_json, print_table
from training.continual.collect import AnsweredBy, Collected, Ratings, collect
from training.data import digest_of, read_jsonl
from training.data_report import Report
from training.errors import DataTooSmall, OutputExists, TrainingError
from training.presets import named_recipe
from training.private_file import write_private
from training.quiet import quiet_libraries
from training.tasks import MODULES, task_named
from training.token_counter import token_counter


@click.command(
    "collect",
    epilog=examples(
        """
hub serve --feedback kept                               # callers mark answers: hub feedback REQUEST_ID --good
hub continual collect kept next.jsonl --adapter team/six --task sentiment --eval held-out.jsonl
hub continual run six.yaml --out runs/six               # a task with train_file: next.jsonl appended to its plan
"""
    ),
)
@click.argument("feedback", metavar="FEEDBACK_DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("out", metavar="OUT.jsonl", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--tenant", metavar="NAME", help="Only this tenant's marks.  [default: everybody's]")
@click.option("--adapter", metavar="REF", help="Only answers of this adapter (any version), or of this one version.")
@click.option(
    "--since", type=click.DateTime(["%Y-%m-%d"]), metavar="YYYY-MM-DD", help="Only marks of this day (UTC) and later."
)
@click.option(
    "--ratings",
    type=click.Choice(get_args(Ratings)),
    default="all",
    show_default=True,
    help="Answers rated good as they are, corrections, or both.",
)
@click.option("--task", type=click.Choice(list(MODULES)), help="Of which task; says what is a fault of an answer.")
@click.option(
    "--eval",
    "evaluation",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="What must not occur in OUT, exactly or nearly: the plan's eval_file.",
)
@click.option("--base", default="smollm2-135m", show_default=True, metavar="NAME|DIR|ORG/NAME[@REV]", help="Tokenizer.")
@json_option
def collect_command(
    feedback: Path, out: Path, tenant: str | None, adapter: str | None, since: datetime | None, ratings: Any,
    task: str | None, evaluation: Path | None, base: str, as_json: bool,
) -> None:  # fmt: skip
    """Make OUT.jsonl, a `train_file`, of the answers in FEEDBACK_DIR that callers marked (`hub serve --feedback`).

    The answer wanted is the correction, else the served answer where it was rated good; bad ones without a correction
    are left out. Then the file is cleaned as `hub data check --fix` does it. Beside it OUT.provenance.json has counts,
    versions and times. Both are readable by you alone: they are what people asked.
    """
    beside = out.with_suffix(".provenance.json")
    for path in (out, beside):
        if path.exists():
            raise OutputExists(f"{path} is there already; write to a new file")
    answered_by = AnsweredBy.parse(adapter) if adapter is not None else None
    quiet_libraries()
    from server.feedback.reading import read_marks
    from training.data_check import check_file

    read = read_marks(feedback, tenant=tenant, since=since.date() if since is not None else None)
    collected = collect(read.marks, ratings=ratings, answered_by=answered_by)
    if not collected.examples:
        raise DataTooSmall(
            f"of {collected.found} marked answers none is an example: {collected.bad} bad without a correction, "
            f"{collected.unasked} not asked for"
        )
    held_out = read_jsonl(evaluation) if evaluation is not None else None
    report = check_file(
        out,
        token_counter(base),
        data="".join(example.as_line() + "\n" for example in collected.examples).encode(),
        answers=task_named(task).answers if task is not None else None,
        evaluation=held_out.examples if held_out is not None else None,
        max_length=named_recipe("recommended").max_length,
    )
    data = report.without_faults()
    collected = collected.only(line.number - 1 for line in report.kept)
    told = {
        "file": out.name,
        "digest": digest_of(data),
        "examples": len(report.kept),
        "asked": {
            "tenant": tenant,
            "adapter": adapter,
            "since": since.date().isoformat() if since is not None else None,
            "ratings": ratings,
            "task": task,
            "eval": held_out.digest if held_out is not None else None,
        },
        "marks": {**collected.as_json(), "replaced": read.replaced, "unreadable_lines": read.unreadable},
        "checked_as": report.answers,
        "removed": {finding.check: finding.count for finding in report.faults},
        "advice": {finding.check: finding.count for finding in report.advice},
    }
    write_private(beside, (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode())
    try:
        write_private(out, data)
    except TrainingError:
        beside.unlink()
        raise
    if as_json:
        print_json(told)
    else:
        _show(out, collected, report, read.unreadable, digest_of(data))


def _show(out: Path, collected: Collected, report: Report, unreadable: int, digest: str) -> None:
    rows = [
        ("marked answers found", collected.found, ""),
        ("good", collected.good, f"{collected.cut_off} of them cut off by max_new_tokens" if collected.cut_off else ""),
        ("corrected", collected.corrected, ""),
        ("bad, dropped", collected.bad, "rated bad and not corrected"),
        ("not asked for, left out", collected.unasked, "--adapter, --ratings"),
        ("lines unreadable", unreadable, "torn by a crash, or none of ours"),
        *((f"removed: {each.check.replace('_', ' ')}", each.count, each.message) for each in report.faults),
        ("kept", len(report.kept), digest),
    ]
    always = {"marked answers found", "good", "corrected", "bad, dropped", "kept"}
    print_table(("", "answers", ""), [(name, str(count), why) for name, count, why in rows if count or name in always])
    click.secho(
        f"{out}: {len(report.kept)} examples, answered {(collected.first or '')[:10]} to {(collected.last or '')[:10]} "
        f"by {', '.join(collected.versions)}",
        bold=True,
    )
