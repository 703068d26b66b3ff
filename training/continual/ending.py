"""What is measured once a run's stages are done: intruders, the tasks' own answers, a router where there is to be one.

DIR/intruders.json     intruder dimensions, by task
DIR/answer_nats.json   see `answer_nats`
DIR/router/            the router over all promoted adapters of `isolated`; routed.json has how it does

What is there for the stages that are done is not measured again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import RouterInvalid
from training.base_weights import matrices
from training.continual import answer_nats
from training.continual.embedding import Embed
from training.continual.factors import read_factors
from training.continual.intruders import SiteIntruders, count
from training.continual.record import RunRecord
from training.continual.router import write_router
from training.continual.routing import alias_names, route
from training.continual.scoring import headline
from training.continual.stage import replace_file

if TYPE_CHECKING:
    from training.continual.run import Run

INTRUDERS, ROUTED, ROUTER = "intruders.json", "routed.json", "router"


def conclude(run: Run, record: RunRecord, evolving: bool) -> None:
    """Measure what is missing; `evolving` is the strategy's."""
    if not record.stages:
        return
    if run.plan.intruders:
        _count_intruders(run, record)
    if answer_nats.read(run.directory, len(record.stages)) is None:
        own = [run.stage_directory(index) / "adapter" for index in range(len(record.stages))]
        told = answer_nats.measure(run.scorer, run.data[: len(own)], own, own[-1] if evolving else None)
        answer_nats.write(run.directory, told, len(own))
        for label, count_ in zip(run.plan.labels, told["too_long"], strict=False):
            if count_:
                run.console.print(f"{label}: {count_} questions are too long for its answer nats", highlight=False)
    if run.embed is not None and not evolving:
        _route(run, record, run.embed)


def read_intruders(directory: Path) -> dict[str, list[SiteIntruders]]:
    """What was counted at the end of the run in `directory`, by task; empty where nothing was."""
    place = directory / INTRUDERS
    if not place.is_file():
        return {}
    told = json.loads(place.read_text("utf-8"))
    return {name: [SiteIntruders(**site) for site in sites] for name, sites in told.items()}


def read_routed(directory: Path) -> dict[str, list[Any]] | None:
    """How the router of the run in `directory` did, by task; None where there is none."""
    place = directory / ROUTED
    told: dict[str, list[Any]] | None = json.loads(place.read_text("utf-8")) if place.is_file() else None
    return told


def _route(run: Run, record: RunRecord, embed: Embed) -> None:
    """Fit the router over all promoted adapters, and score every task with each question answered as it chooses.

    Where none can be fitted the run is finished all the same, and says why it has none.
    """
    place, names = run.directory / ROUTED, alias_names(record)
    if place.is_file() and json.loads(place.read_text("utf-8"))["names"] == list(names):
        return
    try:
        routed = route(run.data, names, embed)
    except RouterInvalid as error:
        run.console.print(f"there is no router: {error}", highlight=False, soft_wrap=True)
        return
    shutil.rmtree(run.directory / ROUTER, ignore_errors=True)
    write_router(routed.router, run.directory / ROUTER)
    adapters = {name: run.stage_directory(index) / "adapter" for index, name in enumerate(names)}
    scores = run.scorer.routed([[adapters[name] if name else None for name in one] for one in routed.chosen])
    told = {
        "names": list(names),
        "scores": [headline(one) for one in scores],
        "oracle": list(record.stages[-1].row[: len(names)]),
        "right": list(routed.right),
        "to_base": list(routed.to_base),
    }
    replace_file(place, json.dumps(told).encode())


def _count_intruders(run: Run, record: RunRecord) -> None:
    place = run.directory / INTRUDERS
    wanted = list(enumerate(stage.task for stage in record.stages))
    if run.plan.intruders == "last":
        wanted = wanted[-1:]
    if place.is_file() and list(json.loads(place.read_text("utf-8"))) == [name for _, name in wanted]:
        return
    adapters = {name: read_factors(run.stage_directory(index) / "adapter") for index, name in wanted}
    modules = list(dict.fromkeys(module for factors in adapters.values() for module in factors))
    run.console.print(f"counting intruder dimensions in {len(modules)} matrices", highlight=False)
    weights = matrices(run.trainer.base_directory, modules)
    found = count(weights, adapters, run.plan.recipe.seed)
    told = {name: [vars(site) for site in sites] for name, sites in found.items()}
    replace_file(place, json.dumps(told).encode())
