"""Models by name, side by side on one task: `hub eval` and the gates of promotions run this."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Final

from server.config import EngineLimits, ModelConfig

if TYPE_CHECKING:
    from training.data import Dataset
    from training.engine_generator import Adapters
    from training.evaluate import Comparison
    from training.tasks import Task

BASE: Final = "base"


def compare_models(
    task: Task, dataset: Dataset, models: Sequence[str], config: ModelConfig, hub_url: str | None
) -> tuple[Comparison, Adapters]:
    """Everything in `models` (BASE, a reference, an adapter directory) on the same examples; and the adapters found."""
    from hub.opening import open_existing
    from server.engine.engine import Engine
    from training.engine_generator import EngineGenerator, find_adapters, is_adapter_directory
    from training.evaluate import evaluate

    names = [model for model in models if model != BASE]
    with ExitStack() as stack:
        in_hub = [name for name in names if not is_adapter_directory(name)]
        hub = stack.enter_context(open_existing(hub_url)) if in_hub else None
        adapters = find_adapters(names, hub)
        engine = stack.enter_context(closing(Engine.build(config, EngineLimits(), adapters.fetch)))
        wanted = [None if model == BASE else model for model in models]
        return evaluate(task, dataset.examples, wanted, EngineGenerator(engine, adapters.uses)), adapters
