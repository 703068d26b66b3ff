"""One cell's training, or one group's scoring, in a process of its own: `python -m training.sweep.child SPEC.json`.

A process of its own has a peak of memory of its own, and what one cell leaves behind cannot slow down the next.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from server.cli import bound_openmp
from training.metrics import Measured
from training.quiet import quiet_libraries


def train_cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Train what `spec` says; what it took and how the losses went."""
    import bitsandbytes  # noqa: F401  # imported here, so that its memory is not counted as the run's
    import peft  # noqa: F401
    import trl  # noqa: F401
    from rich.console import Console

    import training.trainer  # noqa: F401
    from hub.base import base_identity, locate_base
    from training.finetune import Plan, train
    from training.recipe import Recipe

    recipe = Recipe(**{**spec["recipe"], "targets": tuple(spec["recipe"]["targets"])})
    identity, _ = base_identity(spec["base"])
    before = _memory("VmRSS")
    out = Path(spec["out"])
    plan = Plan(
        data=Path(spec["train"]),
        base=identity,
        base_directory=locate_base(spec["base"]).directory,
        recipe=recipe,
        out=out,
        method=recipe.method,  # type: ignore[arg-type]  # checked by Recipe
        threads=spec["threads"],
        checkpoint_steps=200,
        resume=any(out.with_name(out.name + ".checkpoints").glob("checkpoint-*/trainer_state.json")),
    )
    outcome = train(plan, Console(stderr=True, force_terminal=False, width=200))
    return {
        "metrics": outcome.facts.metrics,
        "datasets": outcome.facts.datasets,
        "libraries": outcome.facts.recipe["libraries"],
        "curves": outcome.curves.as_dict(),
        "peak_bytes": _memory("VmHWM"),
        "process_bytes": before,
        "resumed": plan.resume,  # then seconds and memory are those since
    }


def score_group(spec: dict[str, Any]) -> dict[str, Any]:
    """Score every adapter of `spec`, and the base, in one mixed batch; resamples beside each score."""
    from contextlib import closing

    from hub.base import locate_base
    from server.config import EngineLimits, ModelConfig
    from server.engine.engine import Engine
    from training.answer_loss import METRIC, answer_losses
    from training.bootstrap import resampled
    from training.data import read_jsonl
    from training.engine_generator import EngineGenerator, find_adapters
    from training.evaluate import evaluate
    from training.tasks import task_named

    adapters = find_adapters(list(spec["adapters"].values()), None)
    config = ModelConfig(base=spec["base"], quantization=spec["quantization"], threads=spec["threads"])
    wanted: list[str | None] = [*([None] if spec["with_base"] else []), *spec["adapters"].values()]
    examples = read_jsonl(Path(spec["eval"])).examples
    started = time.monotonic()
    with closing(Engine.build(config, EngineLimits(), adapters.fetch)) as engine:
        task, generator = task_named(spec["task"]), EngineGenerator(engine, adapters.uses)
        limit = task.answer_limit(examples, generator.count_tokens)
        found = evaluate(task, examples, wanted, generator, limit)
    answered = time.monotonic() - started
    losses = answer_losses(
        locate_base(spec["base"]).directory,
        {key: Path(directory) for key, directory in spec["adapters"].items()},
        examples,
        quantized=spec["quantization"] == "nf4",
        with_base=spec["with_base"],
    )
    keys = {directory: key for key, directory in spec["adapters"].items()}

    def told(measured: Measured) -> dict[str, Any]:
        draws = resampled(measured, 0, spec["resamples"])
        return {"value": round(measured.value, 6), "resampled": [round(float(x), 4) for x in draws]}

    return {
        "seconds": round(answered, 1),
        "scores": {
            keys.get(result.model, "base"): {
                **{name: told(result.measured[name]) for name in result.metrics},
                METRIC: told(losses[keys.get(result.model)]),
            }
            for result in found.results
        },
    }


def _memory(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    """Do what the spec says and write the result where it says."""
    spec = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    bound_openmp(spec["threads"])
    quiet_libraries()
    done = (train_cell if spec["kind"] == "train" else score_group)(spec)
    result = Path(spec["result"])
    aside = result.with_suffix(".partial")
    aside.write_text(json.dumps(done) + "\n", "utf-8")
    aside.replace(result)


if __name__ == "__main__":
    main()
