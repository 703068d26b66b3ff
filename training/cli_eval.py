"""`hub eval`: the base and adapters on one task, in one table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from hub.cli_options import examples, hub_option, json_option
from hub.cli_output import print_json, print_table
from server.cli import bound_openmp
from server.config import EngineLimits, ModelConfig, Quantization
from training.data import Dataset, read_jsonl
from training.quiet import quiet_libraries
from training.tasks import MODULES, Task, task_named

if TYPE_CHECKING:
    from training.evaluate import Comparison

BASE = "base"


@click.command(
    "eval",
    epilog=examples(
        """
hub eval base team/sentiment:prod --task sentiment --data data/sentiment/eval.jsonl
hub eval base out/sentiment team/sentiment@1 --task sentiment --data data/sentiment/eval.jsonl --limit 100
"""
    ),
)
@click.argument("models", nargs=-1, required=True, metavar="base|REF|DIR…")
@click.option("--task", type=click.Choice(list(MODULES)), required=True, help="Which scores.")
@click.option("--data", type=click.Path(path_type=Path, exists=True, dir_okay=False), required=True)
@click.option("--limit", type=click.IntRange(min=1), help="Only the first examples.")
@click.option("--base", default="smollm2-135m", show_default=True, metavar="NAME|DIR|ORG/NAME[@REV]")
@click.option(
    "--quantize",
    type=click.Choice(get_args(Quantization)),
    default="none",
    show_default=True,
    help="How the base is held; `hub serve` uses nf4 unless told otherwise.",
)
@click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads.  [default: all cores]")
@click.option("--answers", type=click.Path(path_type=Path, dir_okay=False), help="Write every answer here, JSONL.")
@hub_option
@json_option
def evaluate(
    models: tuple[str, ...],
    task: str,
    data: Path,
    limit: int | None,
    base: str,
    quantize: Any,
    threads: int,
    answers: Path | None,
    hub_url: str | None,
    as_json: bool,
) -> None:
    """Score MODELS on the examples of --data. A model is `base`, a reference into the hub, or an adapter directory.

    All answer greedily through the engine that serves them, every model in the same batches.
    """
    if len(set(models)) < len(models):
        raise click.UsageError("a model is named twice")
    chosen, dataset = task_named(task), read_jsonl(data)
    if limit is not None:
        dataset = Dataset(dataset.examples[:limit], dataset.digest)
    bound_openmp(threads)
    quiet_libraries()
    config = ModelConfig(base=base, quantization=quantize, threads=threads)
    comparison = _compare(chosen, dataset, models, config, hub_url)
    if answers is not None:
        _write_answers(answers, dataset, comparison)
    if as_json:
        print_json(
            {
                "task": task,
                "data": {"file": str(data), "digest": dataset.digest, "examples": len(dataset)},
                "base": {"name": base, "quantization": quantize},
                "seconds": round(comparison.seconds, 1),
                "models": {result.model: result.metrics for result in comparison.results},
            }
        )
    else:
        _show(chosen, data, quantize, comparison)


def _compare(
    task: Task, dataset: Dataset, models: Sequence[str], config: ModelConfig, hub_url: str | None
) -> Comparison:
    from hub.hub import Hub
    from server.engine.engine import Engine
    from training.engine_generator import EngineGenerator, find_adapters, is_adapter_directory
    from training.evaluate import evaluate

    names = [model for model in models if model != BASE]
    with ExitStack() as stack:
        in_hub = [name for name in names if not is_adapter_directory(name)]
        hub = stack.enter_context(Hub.open(hub_url)) if in_hub else None
        adapters = find_adapters(names, hub)
        engine = stack.enter_context(closing(Engine.build(config, EngineLimits(), adapters.fetch)))
        wanted = [None if model == BASE else model for model in models]
        return evaluate(task, dataset.examples, wanted, EngineGenerator(engine, adapters.uses))


def _show(task: Task, data: Path, quantization: str, comparison: Comparison) -> None:
    click.secho(f"{task.name} on {comparison.examples} examples of {data}, base in {quantization}", bold=True)
    names = list(comparison.results[0].metrics)
    rows = [(result.model, *(_shown(name, result.metrics[name]) for name in names)) for result in comparison.results]
    print_table(("model", *(_heading(name, task) for name in names)), rows)
    click.echo(f"{comparison.examples * len(comparison.results)} answers in {comparison.seconds:.0f} s", err=True)


def _heading(name: str, task: Task) -> str:
    return f"{name.replace('_', ' ')}{' *' if name == task.headline else ''}"


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
