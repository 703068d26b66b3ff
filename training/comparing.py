"""Models by name, side by side on one task: `hub eval` and the gates of promotions run this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from server.config import EngineLimits, ModelConfig

if TYPE_CHECKING:
    from training.data import Dataset
    from training.engine_generator import Adapters
    from training.evaluate import Comparison
    from training.tasks import Task

BASE: Final = "base"


@dataclass(frozen=True)
class Compared:
    """How models did, and what became of their names."""

    comparison: Comparison
    adapters: Adapters
    cut_off: Mapping[str, int]  # answers of each model that ended only because they could be no longer


def compare_models(
    task: Task,
    dataset: Dataset,
    models: Sequence[str],
    config: ModelConfig,
    hub_url: str | None,
    max_new_tokens: int | None = None,
) -> Compared:
    """Everything in `models` (BASE, a reference, an adapter directory) on the same examples.

    `max_new_tokens` None leaves the length of answers to the task. Raises what the task's `check` raises, before a
    model is loaded, and what the engine raises.
    """
    from hub.opening import open_existing
    from server.engine.engine import Engine
    from training.engine_generator import EngineGenerator, find_adapters, is_adapter_directory
    from training.evaluate import evaluate

    task.check(dataset.examples)
    names = [model for model in models if model != BASE]
    with ExitStack() as stack:
        in_hub = [name for name in names if not is_adapter_directory(name)]
        hub = stack.enter_context(open_existing(hub_url)) if in_hub else None
        adapters = find_adapters(names, hub)
        engine = stack.enter_context(closing(Engine.build(config, EngineLimits(), adapters.fetch)))
        wanted = [None if model == BASE else model for model in models]
        generator = EngineGenerator(engine, adapters.uses)
        limit = max_new_tokens or task.answer_limit(dataset.examples, generator.count_tokens)
        comparison = evaluate(task, dataset.examples, wanted, generator, limit)
        cut_off = {name or BASE: generator.cut_off[name] for name in wanted}
        return Compared(comparison, adapters, cut_off)
