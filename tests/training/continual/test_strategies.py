"""The contract of every strategy, on a model where the right answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.continual import toy as toys
from training.continual.contract import Strategy
from training.continual.errors import ContinualPlanInvalid
from training.continual.factors import Factors, read_factors, relative_difference, write_factors
from training.continual.merging import merged_delta
from training.continual.pacing import STEPS, between
from training.continual.registry import KINDS, strategy_named
from training.continual.strategies import Osf, Reducing, Slao, orthonormal

OPTIONS: dict[str, dict[str, Any]] = {
    "replay": {"share": 0.3, "capacity": 40},
    "on-policy-replay": {"share": 0.3, "capacity": 40},
    "paced-replay": {"share": 0.3, "capacity": 40},
    "merge": {"how": "magnitude"},
}


def every() -> list[Strategy]:
    plain = [strategy_named(name, OPTIONS.get(name, {})) for name in KINDS]
    others = [
        ("merge", {"how": "ties", "density": 1.0}, None),
        ("aimed", {"again": 0.5}, None),
        ("aimed", {"again": 0.5, "aim_last": True}, None),
        ("sequential", {}, 0.5),
    ]
    return [*plain, *(strategy_named(*one) for one in others)]


def names(strategy: Strategy) -> str:
    again = "again" if getattr(strategy, "again", 0) else ""
    return f"{strategy.name}-{getattr(strategy, 'how', again)}".strip("-")


def equal(one: Factors, other: Factors) -> bool:
    return all(torch.equal(p.a, other[m].a) and torch.equal(p.b, other[m].b) for m, p in one.items())


@pytest.fixture(scope="module")
def model() -> Any:
    return toys.toy()


@pytest.fixture(scope="module")
def apart(model: Any) -> list[Any]:
    """Two tasks on different sites."""
    y, x = toys.frame(1)
    change = y[:, :2] @ x[:, :2].T
    return [toys.task(model, toys.SITES[0], change, 1), toys.task(model, toys.SITES[1], change, 2)]


@pytest.fixture(scope="module")
def against(model: Any) -> list[Any]:
    """The second task turns round one half of the first, and brings something of its own."""
    y, x = toys.frame(2)
    first = y[:, :2] @ x[:, :2].T
    second = first - 1.45 * torch.outer(y[:, 0], x[:, 0]) + 0.5 * torch.outer(y[:, 2], x[:, 2])
    return [toys.task(model, toys.SITES[0], change, seed) for seed, change in enumerate((first, second))]


def change_of_first(model: Any, strategy: Strategy, tasks: list[Any]) -> tuple[float, float]:
    """(the first task's score after its stage, after both)."""
    outcomes = model.learn(strategy, tasks)
    answers = outcomes[-1] if strategy.evolving else outcomes[0]
    return model.score(outcomes[0].served, tasks[0]), model.score(answers.served, tasks[0])


@pytest.mark.parametrize("strategy", every(), ids=names)
def test_a_stage_is_a_function_of_its_arguments(model: Any, against: list[Any], strategy: Strategy) -> None:
    short = model.shorter()
    first, again = short.learn_anew(strategy, against), short.learn_anew(strategy, against)
    for one, other in zip(first, again, strict=True):
        assert equal(one.served, other.served) and set(one.kept) == set(other.kept)
        assert one.memory == other.memory and one.notes == other.notes


@pytest.mark.parametrize("strategy", every(), ids=names)
def test_what_is_served_is_a_plain_lora_of_all_sites(
    model: Any, against: list[Any], strategy: Strategy, tmp_path: Path
) -> None:
    served = model.learn(strategy, against)[-1].served
    size = write_factors(tmp_path, served, "toy")
    assert size == sum(4 * (p.a.numel() + p.b.numel()) for p in served.values())
    assert relative_difference(served, read_factors(tmp_path)) < 1e-6


@pytest.mark.parametrize("strategy", every(), ids=names)
def test_the_served_rank_is_known_beforehand(model: Any, against: list[Any], strategy: Strategy) -> None:
    """Merges may be of less: a toy's matrices have no more."""
    for stages, outcome in enumerate(model.learn(strategy, against), 1):
        told = strategy.served_rank(toys.RANK, stages)
        assert max(pair.rank for pair in outcome.served.values()) == min(
            told, toys.OUT if "merge" in strategy.name else told
        )


@pytest.mark.parametrize("strategy", every(), ids=names)
def test_the_first_task_is_learned(model: Any, apart: list[Any], strategy: Strategy) -> None:
    enough = 0.55 if isinstance(strategy, (Osf, Reducing)) else 0.99  # half the directions are closed, or taken out
    if isinstance(strategy, Osf):
        enough = 0.05
    assert model.score(model.learn(strategy, apart[:1])[0].served, apart[0]) > enough


@pytest.mark.parametrize("strategy", every(), ids=names)
def test_tasks_that_share_nothing_do_not_disturb_each_other(model: Any, apart: list[Any], strategy: Strategy) -> None:
    if isinstance(strategy, (Slao, Reducing)):
        pytest.skip("changes sites that a task does not touch, by its definition; see the tests of the formulas")
    before, after = change_of_first(model, strategy, apart)
    assert after == pytest.approx(before, abs=1e-3)


def test_a_task_that_takes_another_back(model: Any, against: list[Any]) -> None:
    """Sequential loses the first, isolated keeps it, what is in between lies in between."""
    kept = {
        names(strategy): after / before
        for strategy in every()
        for before, after in [change_of_first(model, strategy, against)]
    }
    assert kept["sequential"] < 0.05
    assert kept["isolated"] == 1.0
    for other in ("replay", "on-policy-replay", "paced-replay", "o-lora", "slao", "merge-ties", "joint"):
        assert 0.05 < kept[other] < 0.999, (other, kept)


def test_more_replay_forgets_less(model: Any, against: list[Any]) -> None:
    kept = [
        change_of_first(model, strategy_named("replay", {"share": share, "capacity": 60}), against)[1]
        for share in (0.0, 0.1, 0.25, 0.45)
    ]
    assert kept == sorted(kept) and kept[0] < 0.05 < kept[-1]


def test_the_point_between_two_adapters_is_that_of_their_deltas(model: Any, against: list[Any]) -> None:
    before, trained = (model.learn(strategy_named("sequential", {}), against)[n].served for n in (0, 1))
    for step in (0.25, 0.5, 1.0):
        point, error = between(before, trained, step)
        for site, pair in point.items():
            exact = before[site].delta() + step * (trained[site].delta() - before[site].delta())
            assert pair.rank == trained[site].rank
            # The nearest of that rank: what is left out are the exact matrix's further singular values.
            beyond = torch.linalg.svdvals(exact.double())[pair.rank :].norm()
            assert float((pair.delta() - exact).norm()) == pytest.approx(float(beyond), abs=1e-5)
        assert 0 <= error < 1 and (step < 1 or error == 0)


def test_paced_replay_goes_where_all_tasks_are_answered_best(model: Any, against: list[Any]) -> None:
    """With too little replay the trained adapter forgets; the step is the best of those that there are."""
    paced, plain = (strategy_named(name, {"share": 0.05, "capacity": 120}) for name in ("paced-replay", "replay"))
    first, second = model.learn(paced, against)
    trained = model.learn(plain, against)[-1]
    assert equal(first.served, model.learn(plain, against)[0].served) and "step" not in first.notes
    assert second.notes["step"] in STEPS and second.notes["step"] < 1
    both = [
        sum(1 - model.score(between(first.served, trained.served, step)[0], task) for task in against) for step in STEPS
    ]
    assert STEPS[min(range(len(STEPS)), key=both.__getitem__)] == second.notes["step"]
    kept, lost = (model.score(each.served, against[0]) for each in (second, trained))
    assert kept > lost + 0.1
    assert equal(second.served, between(first.served, trained.served, second.notes["step"])[0])


def test_paced_replay_keeps_what_was_trained_where_nothing_is_lost(model: Any, apart: list[Any]) -> None:
    second = model.learn(strategy_named("paced-replay", {}), apart)[-1]
    assert second.notes["step"] == 1 and second.notes["step_error"] == 0


def test_no_replay_is_the_naive_arm(model: Any, against: list[Any]) -> None:
    none = model.learn(strategy_named("replay", {"share": 0.0}), against)[-1].served
    assert equal(none, model.learn(strategy_named("sequential", {}), against)[-1].served)


def test_own_answers_are_the_earlier_adapters(model: Any, against: list[Any]) -> None:
    strategy = strategy_named("on-policy-replay", {"share": 0.3, "capacity": 40})
    first = model.learn(strategy, against[:1])
    past = model.past(1, against, first)
    drawn = strategy.lesson(past).examples[len(against[1]) :]
    assert len(drawn) == round(60 * 0.3 / 0.7)
    assert {row.x for row in drawn} <= {row.x for row in against[0]}
    x, y = toys.tensors(drawn)
    assert torch.equal(model.run(first[0].served, x), y)


def test_earlier_rows_of_o_lora_stay_and_new_ones_lie_apart(model: Any, against: list[Any]) -> None:
    first, second = model.learn(strategy_named("o-lora", {"weight": 100.0}), against)
    for site, pair in second.served.items():
        old = first.served[site]
        assert pair.rank == 2 * toys.RANK
        assert torch.equal(pair.a[: toys.RANK], old.a) and torch.equal(pair.b[:, : toys.RANK], old.b)
    site = toys.SITES[0]
    overlap = (second.served[site].a[toys.RANK :] @ first.served[site].a.T).norm()
    free = model.learn(strategy_named("o-lora", {"weight": 0.0}), against)[1].served[site]
    assert overlap < 0.02 < 0.2 < (free.a[toys.RANK :] @ first.served[site].a.T).norm()


def test_slao_is_its_formula(model: Any, against: list[Any]) -> None:
    tasks = [*against, against[0]]
    outcomes = model.learn(strategy_named("slao", {}), tasks)
    for site in toys.SITES:
        merged = outcomes[0].kept["trained"][site].b
        for stage in (1, 2):
            trained = outcomes[stage].kept["trained"][site]
            merged = merged + (trained.b - merged) / (stage + 1) ** 0.5
            assert torch.allclose(outcomes[stage].served[site].b, merged, atol=1e-6)
            assert torch.equal(outcomes[stage].served[site].a, trained.a)
    start = strategy_named("slao", {}).lesson(model.past(1, tasks, outcomes)).start
    assert start is not None
    for site, pair in start.items():
        old = outcomes[0].kept["trained"][site]
        assert torch.allclose(pair.a @ pair.a.T, torch.eye(toys.RANK), atol=1e-5) and torch.equal(pair.b, old.b)
        assert torch.allclose(old.a @ pair.a.T @ pair.a, old.a, atol=1e-5)  # the same row space
        r = pair.a @ old.a.T
        assert torch.allclose(r, r.triu(), atol=1e-5) and bool((r.diagonal() > 0).all())
    assert torch.equal(orthonormal(old.a), pair.a)


def test_osf_keeps_out_of_the_strongest_directions(model: Any, against: list[Any]) -> None:
    first, second = model.learn(strategy_named("osf", {"keep": 0.4}), against)
    for site in toys.SITES:
        for before, after in ((None, first.served[site]), (first.served[site], second.served[site])):
            weight = model.weights[site] + (before.delta() if before else 0)
            added = after.delta() - (before.delta() if before else 0)
            u, _, vt = torch.linalg.svd(weight)
            assert (u[:, :2].T @ added).abs().max() < 1e-5 and (added @ vt[:2].T).abs().max() < 1e-5
    assert first.served[toys.SITES[0]].norm() > 0.1


def test_ties_and_magnitude_by_hand() -> None:
    deltas = [torch.tensor([[4.0, -1.0, 0.1, 2.0]]), torch.tensor([[1.0, 3.0, 0.2, -3.0]])]
    assert merged_delta(deltas, "magnitude", 1.0).tolist() == [[4.0, 3.0, pytest.approx(0.2), -3.0]]
    # Half of each stays: [4, ., ., 2] and [., 3, ., -3]; the last entry's elected sign is that of 2 - 3.
    assert merged_delta(deltas, "ties", 0.5).tolist() == [[4.0, 3.0, 0.0, -3.0]]
    assert merged_delta(deltas, "ties", 1.0).tolist() == [[2.5, 3.0, pytest.approx(0.15), -3.0]]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("best", {}, "no strategy"),
        ("replay", {"share": 0.6}, "between 0 and 0.5"),
        ("replay", {"share": "much"}, "is a number"),
        ("replay", {"shar": 0.1}, "no option 'shar'"),
        ("sequential", {"share": 0.1}, "it has: none"),
        ("merge", {"how": "best"}, "ties, magnitude"),
        ("osf", {"keep": 0}, "between 0.01"),
    ],
)
def test_strategies_refuse_what_they_do_not_know(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ContinualPlanInvalid, match=said):
        strategy_named(name, options)
