"""A comparison's numbers: each arm over its finished runs, and the figures that are wanted of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from training.continual.aiming import Aimed
from training.continual.compare.plan import ANY_ORDER, Case, Comparison
from training.continual.contract import Strategy
from training.continual.metrics import Matrix
from training.continual.pacing import PacedReplay
from training.continual.registry import strategy_named
from training.continual.strategies import Replay

Record = Mapping[str, Any]  # a finished run's
MAX_REPLAY: Final = 0.05  # of a stage's examples, for an arm that the figures may choose
LEAST_BWT: Final = -0.005
LEAST_BELOW_JOINT: Final = -0.01
LEAST_ROUTED: Final = -0.01
MOST_DRIFT: Final = 0.02


@dataclass(frozen=True)
class Spread:
    """A measure over an arm's runs."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the runs."""
        return sum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        """The lowest run's."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The highest run's."""
        return max(self.values)


@dataclass(frozen=True)
class Arm:
    """One arm and its finished runs."""

    name: str
    evolving: bool  # one adapter that answers all tasks, and no bound
    replay: float  # the share of kept examples among those that a stage trains on
    reads: int  # kept examples that are read again and not trained on: of each earlier task, or of all (paced-replay)
    runs: tuple[tuple[Case, Record], ...]
    measures: Mapping[str, Spread]  # without those that none of the runs has

    def mean(self, measure: str) -> float | None:
        """None where it was not measured."""
        return self.measures[measure].mean if measure in self.measures else None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of its runs, each once."""
        return tuple(sorted({case.seed for case, _ in self.runs}))


@dataclass(frozen=True)
class Wanted:
    """One figure that is wanted, and what was found."""

    text: str
    reached: tuple[Arm, ...]  # the arms that reach it, best first
    best: Arm | None  # of those that count; None: nothing was measured
    measures: tuple[str, ...]  # of `best`, to be told


def arms_of(comparison: Comparison, records: Mapping[Case, Record]) -> list[Arm]:
    """The arms that have a finished run, in the comparison's order; differences are to the bounds of the same seed."""
    joint, single = (_bounds(comparison.bound(name), records) for name in ("joint", "isolated"))
    found = []
    for name in comparison.arms:
        runs = tuple((case, records[case]) for case in comparison.cases if case.arm == name and case in records)
        if not runs:
            continue
        strategy = runs[0][0].plan.strategy
        share, reads = _kept_examples(strategy_named(strategy, runs[0][0].plan.options))
        told = [
            _measured(record, joint.get(case.seed, _Bound()), single.get(case.seed, _Bound())) for case, record in runs
        ]
        found.append(Arm(name, strategy not in ("joint", "isolated"), share, reads, runs, _spreads(told)))
    return found


def _kept_examples(strategy: Strategy) -> tuple[float, int]:
    """(the share of kept examples that a stage trains on, how many more it reads)."""
    match strategy:
        case Replay():
            return strategy.share, 0
        case PacedReplay():
            return strategy.share, strategy.judges
        case Aimed():
            return 0.0, strategy.reads
    return 0.0, 0


def wanted(arms: Sequence[Arm]) -> list[Wanted]:
    """What is wanted of one evolving adapter with little replay, of the router, and of other text."""
    evolving = [arm for arm in arms if arm.evolving and arm.replay <= MAX_REPLAY + 1e-9]
    routed = [arm for arm in arms if "routed_minus_oracle" in arm.measures]

    def both(arm: Arm) -> float | None:
        bwt, below = arm.mean("bwt"), arm.mean("below_joint")
        return None if bwt is None or below is None else min(bwt - LEAST_BWT, below - LEAST_BELOW_JOINT)

    return [
        _wanted("BWT ≥ −0.5 points", evolving, lambda arm: arm.mean("bwt"), LEAST_BWT, ("bwt", "acc")),
        _wanted(
            "ACC − joint bound ≥ −1 point", evolving, lambda arm: arm.mean("below_joint"), LEAST_BELOW_JOINT,
            ("below_joint", "bwt"),
        ),
        _wanted("both by the same arm", evolving, both, 0.0, ("bwt", "below_joint")),
        _wanted(
            "isolated, routed − oracle ≥ −1 point", routed, lambda arm: arm.mean("routed_minus_oracle"), LEAST_ROUTED,
            ("routed_minus_oracle", "routed_acc"),
        ),
        _wanted(
            "text drift ≤ 0.02 nats a token", evolving, lambda arm: _negative(arm.mean("drift")), -MOST_DRIFT,
            ("drift", "acc"),
        ),
    ]  # fmt: skip


def mean_matrix(arm: Arm) -> tuple[str, Matrix] | None:
    """(order, the mean over seeds) of the first order that the arm has runs in; None for what has no stages."""
    orders = [case.order for case, record in arm.runs if len(record["summary"]["matrix"]) > 1]
    if not orders or orders[0] == ANY_ORDER:
        return None
    told = [record["summary"] for case, record in arm.runs if case.order == orders[0]]
    stages = len(told[0]["matrix"])
    rows = tuple(_column_means([one["matrix"][stage] for one in told]) for stage in range(stages))
    return orders[0], Matrix(tuple(told[0]["tasks"]), _column_means([one["base"] for one in told]), rows)


def learned_means(arm: Arm) -> list[float]:
    """After each stage, the mean score of the tasks learned so far, over all runs."""
    rows = [record["summary"]["matrix"] for _, record in arm.runs]
    return [_mean([_mean(matrix[stage][: stage + 1]) for matrix in rows]) for stage in range(len(rows[0]))]


@dataclass(frozen=True)
class _Bound:
    """What a bound came to with one seed."""

    acc: float | None = None
    nats: float | None = None


def _measured(record: Record, joint: _Bound, single: _Bound) -> dict[str, float | None]:
    told = record["summary"]
    stages, routed = told["stages"], told["routed"]
    last, strategy = stages[-1], told["plan"]["strategy"]["name"]
    own = strategy == "isolated"
    found = last["intruders"] or {}
    acc, base = told["acc"], told["base_text_nats"]
    drifts = [stage["text_nats"] - base for stage in (stages if own else [last])] if base is not None else []
    routed_acc = _mean(routed["scores"]) if routed else None
    nats = told.get("answer_nats")  # not in results from before it was measured
    steps = [after - before for before, after in zip(nats["own"], nats["last"], strict=True)] if nats else []
    mean_nats = _mean(nats["last"]) if nats else None
    return {
        "acc": acc,
        "below_joint": _minus(acc, joint.acc),
        "below_single": _minus(acc, single.acc),
        "bwt": told["bwt"],
        "fwt": told["fwt"],
        "forgetting": told["forgetting"],
        "worst": told["worst"]["change"] if told["worst"] else None,
        "drift": max(drifts) if drifts else None,
        "answer_nats": mean_nats,
        "answer_nats_below_joint": _minus(mean_nats, joint.nats),
        "answer_nats_below_single": _minus(mean_nats, single.nats),
        "answer_nats_lost": _mean(steps[:-1]) if len(steps) > 1 and strategy != "joint" else None,
        "intruders": found.get("intruders"),
        "random": found.get("random"),
        "relative_norm": found.get("relative_norm"),
        "replay_bytes": last["memory_bytes"],
        "kept_bytes": sum(one["kept_bytes"] for one in (stages if strategy == "merge" else [last])),
        "adapter_bytes": sum(stage["adapter_bytes"] for stage in stages) if own else last["adapter_bytes"],
        "rank": record["served_rank"],
        "seconds": record["training_cpu_seconds"],
        "routed_acc": routed_acc,
        "routed_below_joint": _minus(routed_acc, joint.acc),
        "routed_below_single": _minus(routed_acc, single.acc),
        "routed_minus_oracle": routed_acc - _mean(routed["oracle"]) if routed_acc is not None else None,
    }


def _bounds(arm: str | None, records: Mapping[Case, Record]) -> dict[int, _Bound]:
    found = {}
    for case, record in records.items():
        if case.arm == arm:
            nats = record["summary"].get("answer_nats")
            found[case.seed] = _Bound(record["summary"]["acc"], _mean(nats["last"]) if nats else None)
    return found


def _minus(value: float | None, bound: float | None) -> float | None:
    return None if value is None or bound is None else value - bound


def _spreads(told: Sequence[Mapping[str, float | None]]) -> dict[str, Spread]:
    spreads = {}
    for measure in told[0]:
        values = tuple(float(value) for one in told if (value := one[measure]) is not None)
        if values:
            spreads[measure] = Spread(values)
    return spreads


def _wanted(
    text: str, arms: Sequence[Arm], value: Callable[[Arm], float | None], least: float, measures: tuple[str, ...]
) -> Wanted:
    known = [(found, arm) for arm in arms if (found := value(arm)) is not None]
    known.sort(key=lambda one: -one[0])
    reached = tuple(arm for found, arm in known if found >= least - 1e-12)
    return Wanted(text, reached, known[0][1] if known else None, measures)


def _column_means(rows: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(_mean(column) for column in zip(*rows, strict=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _negative(value: float | None) -> float | None:
    return None if value is None else -value
