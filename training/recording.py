"""`hub eval --record`: scores written beside the versions they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hub.actor import current_user
from hub.evaluations import Evaluation, Evaluations
from hub.opening import open_existing
from training.bootstrap import Interval
from training.engine_generator import is_adapter_directory
from training.errors import NothingToRecord

Scores = Mapping[str, tuple[float, Interval]]


def versions_among(models: Sequence[str], base: str) -> list[str]:
    """Those of `models` that are references into the hub. Raises `NothingToRecord` where none is."""
    found = [model for model in models if model != base and not is_adapter_directory(model)]
    if not found:
        raise NothingToRecord("--record keeps scores of versions in the hub, and no model named is one")
    return found


def record(
    models: Sequence[str], digests: Mapping[str, str], results: Mapping[str, Scores], hub_url: str | None,
    *, task: str, data: Mapping[str, Any], base: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """Keep the scores of `models`, each about the version that was scored (its digest), wherever aliases point now.

    Returns the versions' texts. Raises what `hub.evaluations` raises.
    """
    kept = Evaluations.of(hub_url)
    texts = []
    with open_existing(hub_url) as hub:
        for model in models:
            version = hub.get(digests[model])
            kept.add(
                version,
                Evaluation(
                    version=version.text,
                    digest=version.digest,
                    task=task,
                    data=data,
                    base=base,
                    metrics={name: value for name, (value, _) in results[model].items()},
                    intervals={name: (interval.low, interval.high) for name, (_, interval) in results[model].items()},
                    by=current_user(),
                ),
            )
            texts.append(version.text)
    return texts
