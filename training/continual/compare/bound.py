"""The bound of all tasks at once: `joint` trained on everything a single time, not once for every stage before."""

from __future__ import annotations

from typing import Any

from hub.facts import Facts
from training.base_weights import matrices
from training.continual import answer_nats
from training.continual.contract import Past
from training.continual.factors import read_factors, write_factors
from training.continual.intruders import count
from training.continual.metrics import drift
from training.continual.registry import strategy_named
from training.continual.report import intruder_totals
from training.continual.run import Run
from training.continual.scoring import headline
from training.data import Example


def joint_bound(run: Run) -> tuple[dict[str, Any], Facts]:
    """The numbers of the last stage of `joint`, as `report.summary` names them, and the facts of its training.

    The matrix has one row.
    Goes on where it was stopped, as `StageTrainer` does. Nothing is pushed.
    """
    plan, place = run.plan, run.directory / "joint"
    past: Past[Example] = Past(
        stage=len(run.data) - 1,
        examples=run.data[-1].train.examples,
        outcomes=(),
        earlier=tuple(task.train.examples for task in run.data[:-1]),
        answers=lambda *_: (),
        readable=lambda examples: examples,
        losses=lambda *_: (),
        inputs=lambda *_: {},
        train=lambda _: {},
        weights=lambda modules: matrices(run.trainer.base_directory, modules),
        seed=plan.recipe.seed,
    )
    strategy = strategy_named(plan.strategy, plan.options, plan.reduce_intruders)
    trained = run.trainer.fit(strategy.lesson(past), place, run.console)
    outcome = strategy.finish(past, trained.factors)
    served = place / "served"
    served.mkdir(parents=True, exist_ok=True)
    size = write_factors(served, outcome.served, run.trainer.base.name or "")
    exams = range(len(plan.tasks))
    found = run.scorer.scores([*((exam, None) for exam in exams), *((exam, served) for exam in exams)])
    scores = [headline(one) for one in found]
    base, row = scores[: len(exams)], scores[len(exams) :]
    nats = run.scorer.text_nats([None, served]) if plan.text is not None else [None, None]
    answers = answer_nats.measure(run.scorer, run.data, [served] * len(run.data), None)
    sites = []
    if plan.intruders:
        factors = {"joint": read_factors(served)}
        sites = count(matrices(run.trainer.base_directory, list(factors["joint"])), factors, plan.recipe.seed)["joint"]
    told = {
        "plan": plan.as_dict(),
        "tasks": list(plan.labels),
        "base": base,
        "matrix": [row],
        "acc": sum(row) / len(row),
        "bwt": None,
        "fwt": None,
        "forgetting": None,
        "worst": None,
        "routed": None,
        "answer_nats": answers,
        "base_text_nats": nats[0],
        "text_drift_nats": drift(nats[0], nats[1]) if nats[0] is not None and nats[1] is not None else None,
        "stages": [
            {
                "task": "all",
                "text_nats": nats[1],
                "seconds": float(trained.facts.metrics.get("seconds", 0.0)),
                "adapter_bytes": size,
                "kept_bytes": 0,
                "memory_bytes": sum(task.train_file.stat().st_size for task in run.data),
                "notes": dict(outcome.notes),
                "intruders": intruder_totals(sites),
            }
        ],
    }
    return told, trained.facts
