"""`hub eval --record`: scores written beside the versions they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from hub.errors import BlobCorrupt
from hub.evaluation import Evaluation
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


def check_kept(models: Sequence[str], hub_url: str | None) -> None:
    """Ask the hub for what it has of `models`; refuses now what `record` would refuse after all the work."""
    with open_existing(hub_url) as hub:
        for model in models:
            with suppress(BlobCorrupt):  # an older record is damaged, which keeps no new one out
                hub.evaluations(hub.resolve(model).digest)


def record(
    models: Sequence[str], digests: Mapping[str, str], results: Mapping[str, Scores], hub_url: str | None,
    *, task: str, data: Mapping[str, Any], base: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """Keep the scores of `models`, each about the version that was scored (its digest), wherever aliases point now.

    Returns the versions' texts. Raises what `Hub.add_evaluation` raises.
    """
    texts = []
    with open_existing(hub_url) as hub:
        for model in models:
            version = hub.get(digests[model])
            hub.add_evaluation(
                Evaluation(
                    version=version.text,
                    digest=version.digest,
                    task=task,
                    data=data,
                    base=base,
                    metrics={name: value for name, (value, _) in results[model].items()},
                    intervals={name: (interval.low, interval.high) for name, (_, interval) in results[model].items()},
                )
            )
            texts.append(version.text)
    return texts
