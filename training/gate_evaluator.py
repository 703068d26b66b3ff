"""The evaluation of a promotion's gate: the same that `hub eval` runs, on references into a hub."""

from __future__ import annotations

from collections.abc import Sequence

from hub.errors import GateMalformed
from hub.gate_evaluation import Evaluation, Measured
from server.cli import bound_openmp
from server.config import ModelConfig
from training.comparing import compare_models
from training.data import Dataset, read_jsonl
from training.quiet import quiet_libraries
from training.tasks import MODULES, task_named

QUANTIZATIONS = ("nf4", "int8", "none")


def measure(evaluation: Evaluation, refs: Sequence[str], hub_url: str | None) -> Measured:
    """Every reference's scores by the gate's task, under the names that `hub eval` shows.

    Raises GateMalformed for what the gate names and is not there, and what `hub eval` raises.
    """
    if evaluation.task not in MODULES:
        raise GateMalformed(f"evaluate.task: there is no task {evaluation.task[:60]!a}; known: {', '.join(MODULES)}")
    quantize = evaluation.quantize or "none"
    if quantize not in QUANTIZATIONS:
        raise GateMalformed(f"evaluate.quantize is one of {', '.join(QUANTIZATIONS)}")
    if not evaluation.data.is_file():
        raise GateMalformed(f"evaluate.data: there is no file {evaluation.data}")
    dataset = read_jsonl(evaluation.data)
    dataset = Dataset(dataset.examples[: evaluation.limit], dataset.digest)
    bound_openmp(0)
    quiet_libraries()
    config = ModelConfig(base=evaluation.base or "smollm2-135m", quantization=quantize)  # type: ignore[arg-type]
    comparison = compare_models(task_named(evaluation.task), dataset, refs, config, hub_url).comparison
    source = f"{evaluation.task}, {comparison.examples} examples, data {dataset.digest[:19]}, base in {quantize}"
    return Measured(tuple(result.metrics for result in comparison.results), source)
