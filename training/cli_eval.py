"""`hub eval`: the base and adapters on one task, in one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, print_table
from server.cli import bound_openmp
from server.config import ModelConfig, Quantization
from training.comparing import BASE, compare_models
from training.data import Dataset, digest_of, read_jsonl
from training.output import check_writable
from training.quiet import quiet_libraries
from training.tasks import MODULES, OWN, Task, task_named

if TYPE_CHECKING:
    from training.bootstrap import Interval
    from training.comparing import Compared
    from training.engine_generator import Adapters
    from training.evaluate import Comparison, Difference, Result
    from training.metrics import Measured

TEXT_LOSS = "text_nats_per_token"  # lower is better, unlike every metric of a task


@click.command(
    "eval",
    epilog=examples(
        """
hub eval base team/sentiment:prod --task sentiment --data data/sentiment/eval.jsonl
hub eval base out/sentiment team/sentiment@1 --task sentiment --data data/sentiment/eval.jsonl --limit 100
hub eval team/sentiment:prod --task sentiment --data data/sentiment/eval.jsonl --compare base --text README.md
hub eval team/sentiment:canary --task sentiment --data data/sentiment/eval.jsonl --record
"""
    ),
)
@click.argument("models", nargs=-1, required=True, metavar="base|REF|DIR…")
@click.option("--task", type=click.Choice([*MODULES, *OWN]), required=True, help="Which scores.")
@click.option("--data", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first examples.")
@click.option(
    "--compare",
    metavar="base|REF|DIR",
    help="Score this model too, and show the others' differences to it (paired bootstrap intervals).",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the bootstrap.")
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Held-out text, UTF-8: also each model's cross-entropy on it, in float32 (lower is better).",
)
@click.option("--text-windows", type=click.IntRange(min=1), default=64, show_default=True, help="Of 256 tokens, most.")
@click.option("--base", default="smollm2-135m", show_default=True, metavar="NAME|DIR|REF|ORG/NAME[@REV]")
@click.option(
    "--quantize",
    type=click.Choice(get_args(Quantization)),
    default="none",
    show_default=True,
    help="How the base is held; `hub serve` uses nf4 unless told otherwise.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Of an answer.  [default: the task's; for own-… tasks room for the longest wanted answer too]",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads.  [default: all cores]")
@click.option("--answers", type=click.Path(path_type=Path, dir_okay=False), help="Write every answer here, JSONL.")
@click.option("--record", is_flag=True, help="Keep the scores beside the versions in the hub; `hub show` shows them.")
@hub_option
@json_option
def evaluate(
    models: tuple[str, ...],
    task: str,
    data: Path,
    limit: int | None,
    compare: str | None,
    seed: int,
    text: Path | None,
    text_windows: int,
    base: str,
    quantize: Any,
    max_new_tokens: int | None,
    threads: int,
    answers: Path | None,
    record: bool,
    hub_url: str | None,
    as_json: bool,
) -> None:
    """Score MODELS on the examples of --data. A model is `base`, a reference into the hub, or an adapter directory.

    All answer greedily through the engine that serves them, every model in the same batches. Intervals are 95 %
    bootstrap intervals over the examples: they cover which questions were asked, not the seed of the training.
    """
    if len(set(models)) < len(models):
        raise click.UsageError("a model is named twice")
    if compare is not None and compare not in models:
        models = (compare, *models)
    if compare is not None and len(models) == 1:
        raise click.UsageError(f"there is nothing to compare {compare} with")
    if record:
        from training import recording

        in_hub = recording.versions_among(models, BASE)
        recording.check_kept(in_hub, hub_url)
    chosen, dataset = task_named(task), read_jsonl(data)
    if limit is not None:
        dataset = Dataset(dataset.examples[:limit], dataset.digest)
    # What could not be used is found out now, not after every answer.
    held_out = _read_text(text) if text is not None else None
    if answers is not None:
        check_writable(answers)
    bound_openmp(threads)
    quiet_libraries()
    from hub.model_base import find_base

    named, base = base, find_base(base, hub_url)
    if text is not None and held_out is not None:
        _check_length(text, held_out, base)
    config = ModelConfig(base=base, quantization=quantize, threads=threads)
    compared = compare_models(chosen, dataset, models, config, hub_url, max_new_tokens)
    comparison, adapters = compared.comparison, compared.adapters
    texts = _text_losses(base, models, adapters, held_out, text_windows) if held_out is not None else {}
    results = {result.model: _told(result, texts, seed) for result in comparison.results}
    differences = _differences(comparison, texts, compare, seed) if compare is not None else {}
    if answers is not None:
        _write_answers(answers, dataset, comparison)
    if as_json:
        print_json(
            {
                "task": task,
                "data": {"file": str(data), "digest": dataset.digest, "examples": len(dataset)},
                "base": {"name": named, "quantization": quantize},
                "seconds": round(comparison.seconds, 1),
                "max_new_tokens": comparison.max_new_tokens,
                "cut_off": dict(compared.cut_off),
                "models": {
                    model: {name: value for name, (value, _) in scores.items()} for model, scores in results.items()
                },
                "intervals": {
                    "share": 0.95,
                    "seed": seed,
                    "models": {
                        model: {name: [i.low, i.high] for name, (_, i) in scores.items()}
                        for model, scores in results.items()
                    },
                },
                "text": {"file": str(text), "digest": digest_of(text.read_bytes())} if text is not None else None,
                "compare": {
                    "to": compare,
                    "differences": {
                        model: {
                            name: {"value": d.value, "interval": [d.interval.low, d.interval.high]}
                            for name, d in each.items()
                        }
                        for model, each in differences.items()
                    },
                }
                if compare is not None
                else None,
            }
        )
    else:
        _show(chosen, data, quantize, comparison, results)
        _show_cut_off(compared)
        if compare is not None:
            _show_differences(compare, chosen, differences)
    if record:  # last, so that a refusal loses nothing
        recorded = recording.record(
            in_hub, {model: adapters.uses[model].digest for model in in_hub}, results, hub_url, task=task,
            data={"digest": dataset.digest, "examples": len(dataset)}, base={"name": named, "quantization": quantize},
        )  # fmt: skip
        click.echo(f"recorded: {', '.join(recorded)}", err=True)


def _read_text(path: Path) -> str:
    from training.text_loss import read_text

    return read_text(path)


def _check_length(path: Path, text: str, base: str) -> None:
    from hub.base import locate_base
    from training.errors import DataTooSmall
    from training.text_loss import cut

    try:
        cut(locate_base(base).directory, text)
    except DataTooSmall as error:
        raise DataTooSmall(f"--text {path}: {error}") from error


def _text_losses(base: str, models: Sequence[str], adapters: Adapters, text: str, windows: int) -> dict[str, Measured]:
    """By model; run when the engine is gone, for one base in memory is enough."""
    from hub.base import locate_base
    from training.text_loss import text_losses

    files = {
        None if model == BASE else model: adapters.fetch(adapters.uses[model].digest) if model != BASE else None
        for model in models
    }
    losses = text_losses(locate_base(base).directory, files, text, windows)
    return {name or BASE: measured for name, measured in losses.items()}


def _told(result: Result, texts: dict[str, Measured], seed: int) -> dict[str, tuple[float, Interval]]:
    """Every score of a model with its interval."""
    from training.bootstrap import interval

    intervals = result.intervals(seed)
    told = {name: (value, intervals[name]) for name, value in result.metrics.items()}
    if result.model in texts:
        told[TEXT_LOSS] = (texts[result.model].value, interval(texts[result.model], seed))
    return told


def _differences(
    comparison: Comparison, texts: dict[str, Measured], compare: str, seed: int
) -> dict[str, dict[str, Difference]]:
    """Every other model's scores minus those of `compare`."""
    from training.bootstrap import interval_of_difference
    from training.evaluate import Difference

    [reference] = [result for result in comparison.results if result.model == compare]
    found = {}
    for result in comparison.results:
        if result is reference:
            continue
        found[result.model] = result.against(reference, seed)
        if texts:
            own, other = texts[result.model], texts[compare]
            found[result.model][TEXT_LOSS] = Difference(
                own.value - other.value, interval_of_difference(own, other, seed)
            )
    return found


def _show(
    task: Task,
    data: Path,
    quantization: str,
    comparison: Comparison,
    results: dict[str, dict[str, tuple[float, Interval]]],
) -> None:
    click.secho(f"{task.name} on {comparison.examples} examples of {data}, base in {quantization}", bold=True)
    names = list(next(iter(results.values())))
    rows = [
        (model, *(f"{_shown(name, value)} [{_shown(name, i.low)}, {_shown(name, i.high)}]" for name, (value, i) in r))
        for model, r in ((model, scores.items()) for model, scores in results.items())
    ]
    print_table(("model", *(_heading(name, task) for name in names)), rows)
    click.echo(f"{comparison.examples * len(comparison.results)} answers in {comparison.seconds:.0f} s", err=True)


def _show_cut_off(compared: Compared) -> None:
    """Whose answers might have gone on: their scores say less."""
    most = compared.comparison.max_new_tokens
    for model, count in compared.cut_off.items():
        if count:
            of = f"{count} of {compared.comparison.examples} answers"
            click.echo(f"{model}: {of} ended at the limit of {most} tokens; see --max-new-tokens", err=True)


def _show_differences(compare: str, task: Task, differences: dict[str, dict[str, Difference]]) -> None:
    """One row a model and metric; a difference whose interval has zero inside may be chance."""
    click.echo()
    click.secho(f"minus {compare}, on the same questions", bold=True)
    rows = []
    for model, each in differences.items():
        for name, difference in each.items():
            low, high = difference.interval.low, difference.interval.high
            told = "the same" if low == high == 0 else "higher" if low > 0 else "lower" if high < 0 else "may be chance"
            rows.append((model, _heading(name, task), f"{difference.value:+.3f}", f"{low:+.3f} … {high:+.3f}", told))
    print_table(("model", "metric", "difference", "95 % interval", ""), rows)


def _heading(name: str, task: Task) -> str:
    mark = " *" if name == task.headline else " (lower is better)" if name == TEXT_LOSS else ""
    return name.replace("_", " ") + mark


def _shown(name: str, value: float) -> str:
    return f"{value:.1f}" if name.endswith("_count") else f"{value:.3f}"


def _write_answers(path: Path, dataset: Dataset, comparison: Comparison) -> None:
    with path.open("w", encoding="utf-8") as file:
        for index, example in enumerate(dataset.examples):
            row = {
                "prompt": example.prompt[-1].content,
                "wanted": example.answer,
                "answers": {result.model: result.answers[index] for result in comparison.results},
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
