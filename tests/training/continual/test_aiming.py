"""Rows aimed by least squares: against the normal equations solved otherwise, and where the right answer is known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.continual import toy as toys
from tests.training.continual.test_stage import fresh
from training import trainable
from training.continual.aiming import TIMES, aimed, energy
from training.continual.contract import Strategy
from training.continual.errors import ContinualPlanInvalid
from training.continual.factors import Factors, Pair, joined, write_factors
from training.continual.inputs import input_moments, readable
from training.continual.registry import strategy_named
from training.continual.replay import sample
from training.data import Example


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Any:
    return toys.toy()


@pytest.fixture(scope="module")
def overlapping(model: Any) -> list[tuple[toys.Row, ...]]:
    """Two tasks on one site, whose inputs differ in some directions and share one; the second wants no more of it."""
    _, x = toys.frame(3)
    change = draw(toys.OUT, toys.IN, seed=4) / 2
    found = []
    for seed, columns in enumerate((x[:, [0, 1, 5]], x[:, [2, 3, 5]])):
        inputs = draw(60, 3, seed=10 + seed) * torch.tensor([1.0, 1.0, 0.3])
        rows = torch.zeros(60, 2 * toys.IN)
        rows[:, : toys.IN] = inputs @ columns.T
        wanted = model.weights[toys.SITES[0]] + change * (1 - 2 * seed)
        y = rows[:, : toys.IN] @ wanted.T
        found.append(tuple(toys.Row(tuple(a), tuple(b)) for a, b in zip(rows.tolist(), y.tolist(), strict=True)))
    return found


def kept(model: Any, strategy: Strategy, tasks: Sequence[Any]) -> float:
    """What is left of the first task's score after the second."""
    first, second = model.learn(strategy, tasks)
    return float(model.score(second.served, tasks[0]) / model.score(first.served, tasks[0]))


@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_least_squares_answer(seed: int) -> None:
    """No nearby rows do better on what is asked, with G as it is shrunk; and the rank stays."""
    pair = Pair(draw(3, 8, seed=seed), draw(6, 3, seed=seed + 50))
    grams = []
    for number in (1, 2):
        x = draw(40, 8, seed=seed + 100 * number) * torch.linspace(0.2, 2, 8)
        gram = (x.T @ x / 40).double()
        grams.append((gram, 0.97 * gram + 0.03 * torch.diag(gram.diagonal())))
    (own, own_shrunk), (others, others_shrunk) = grams
    ridge = 1e-3 * float((own_shrunk + others_shrunk).diagonal().mean()) * torch.eye(8, dtype=torch.float64)

    def cost(delta: Tensor) -> float:
        wrong = delta - pair.delta().double()
        return float((wrong @ own_shrunk * wrong).sum() + (delta @ (others_shrunk + ridge) * delta).sum())

    found = aimed(pair, own.float(), others.float())
    assert found.rank == 3 and torch.equal(found.b, pair.b)
    best = cost(found.delta().double())
    exact = pair.delta().double() @ own_shrunk @ torch.linalg.inv(own_shrunk + others_shrunk + ridge)
    assert best == pytest.approx(cost(exact), rel=1e-6)
    for other in range(20):
        assert cost(found.delta().double() + 0.05 * draw(6, 8, seed=1000 + other).double()) > best


def test_directions_of_its_own_stay_and_those_of_others_go() -> None:
    axes = torch.eye(6)
    own, others = torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0])), torch.diag(torch.tensor([0.0, 0, 1, 1, 1, 0]))
    pair = Pair(draw(2, 6, seed=1), draw(4, 2, seed=2))
    found = aimed(pair, own, others).delta()
    before = pair.delta()
    assert torch.allclose(found @ axes[:, :2], before @ axes[:, :2], rtol=2e-3)  # only its own inputs
    assert torch.allclose(found @ axes[:, 2], before @ axes[:, 2] / 2, rtol=2e-3)  # both as much
    assert found[:, 3:].abs().max() == 0  # others' and nobody's
    assert energy(pair, own) == pytest.approx(float((before @ own * before).sum()), rel=1e-5)


def test_more_weight_keeps_more_of_the_new_task_and_leaves_more_on_the_others(
    model: Any, overlapping: list[Any]
) -> None:
    notes = [
        model.learn(strategy_named("aimed", {"own_weight": weight}), overlapping)[1].notes for weight in (0.3, 1, 3)
    ]
    for name in ("kept_on_own", "left_on_others"):
        found = [one[name] for one in notes]
        assert found == sorted(found) and found[0] < found[-1] - 0.01


def test_judges_take_the_weight_with_the_least_mean_log_loss(model: Any, overlapping: list[Any]) -> None:
    chosen = set()
    for own_weight in (0.02, 0.3, 1.0, 4.0):
        strategy = strategy_named("aimed", {"judges": 10, "own_weight": own_weight})
        first, second = model.learn(strategy, overlapping)
        assert first.notes["own_weight"] == own_weight  # nothing to judge yet
        by_weight = {}
        for times in TIMES:
            plain = strategy_named("aimed", {"own_weight": own_weight * times})
            served = plain.finish(model.past(1, overlapping, [first]), trained_after(model, overlapping, first)).served
            logs = []
            for task in overlapping:
                rows = sample(task, 24, "keep:0")[:10]
                logs.append(math.log(sum(model.losses([served], rows)[0]) / len(rows)))
            by_weight[own_weight * times] = (sum(logs), served)
        best = min(by_weight, key=lambda weight: by_weight[weight][0])
        assert second.notes["own_weight"] == best
        assert all(torch.equal(pair.a, by_weight[best][1][site].a) for site, pair in second.served.items())
        chosen.add(best / own_weight)
    assert len(chosen) > 1


def trained_after(model: Any, tasks: Sequence[Any], first: Any) -> Factors:
    found: Factors = model.fit(strategy_named("aimed", {}).lesson(model.past(1, tasks, [first])))
    return found


def test_where_nothing_comes_in_nothing_is_changed() -> None:
    pair = Pair(draw(2, 6, seed=1), draw(4, 2, seed=2))
    assert aimed(pair, torch.zeros(6, 6), torch.zeros(6, 6)) is pair


def test_it_forgets_less_than_sequential_where_inputs_differ(model: Any, overlapping: list[Any]) -> None:
    naive, own = (kept(model, strategy_named(name, {}), overlapping) for name in ("sequential", "aimed"))
    assert naive < 0.9 < 0.97 < own
    second = model.learn(strategy_named("aimed", {}), overlapping)[1]
    assert model.score(second.served, overlapping[1]) > 0.9
    assert second.notes["kept_on_own"] > 0.9 and second.notes["left_on_others"] < 0.5


def test_earlier_rows_stay_bit_for_bit_and_new_ones_keep_their_b(model: Any, overlapping: list[Any]) -> None:
    strategy = strategy_named("aimed", {})
    first, second = model.learn(strategy, overlapping)
    trained = model.fit(strategy.lesson(model.past(1, overlapping, [first])))
    for site, pair in second.served.items():
        rank = first.served[site].rank
        assert pair.rank == 2 * rank
        assert torch.equal(pair.a[:rank], first.served[site].a)
        assert torch.equal(pair.b, trained[site].b)


def test_training_b_again_gives_back_what_aiming_took_and_not_what_it_kept(model: Any, overlapping: list[Any]) -> None:
    plain, again = (
        model.learn(strategy_named("aimed", {"own_weight": 0.3, **more}), overlapping) for more in ({}, {"again": 1.0})
    )
    for site, pair in again[1].served.items():
        rank = again[0].served[site].rank
        assert torch.equal(pair.a[:rank], again[0].served[site].a)
        assert torch.equal(pair.b[:, :rank], again[0].served[site].b)
    learned, kept_ = (
        [float(model.score(outcomes[1].served, task)) for outcomes in (plain, again)] for task in overlapping[::-1]
    )
    naive = model.learn(strategy_named("sequential", {}), overlapping)[1]
    assert 1 - learned[1] < 0.5 * (1 - learned[0])  # of the new task's error less than half is left
    assert kept_[1] > kept_[0] - 0.1 > float(model.score(naive.served, overlapping[0]))


def test_with_b_trained_again_its_a_is_the_aimed_one(model: Any, overlapping: list[Any]) -> None:
    strategy = strategy_named("aimed", {"again": 0.5})
    first = model.learn(strategy, overlapping)[0]
    past = model.past(1, overlapping, [first])
    trained = model.fit(strategy.lesson(past))
    asked: list[Any] = []
    second = strategy.finish(
        type(past)(**{**vars(past), "train": lambda lesson: asked.append(lesson) or model.fit(lesson)}), trained
    )
    plain = strategy_named("aimed", {}).finish(past, trained)
    [lesson] = asked
    assert lesson.passes == 0.5 and lesson.examples == past.examples and second.notes == plain.notes
    for site, pair in plain.served.items():
        assert torch.equal(lesson.start[site].a, pair.a) and torch.equal(lesson.start[site].b, pair.b)
        assert torch.equal(second.served[site].a, pair.a)
        assert lesson.rules[site].still and lesson.rules[site].frozen == first.served[site].rank


def test_aimed_last_it_leaves_earlier_tasks_alone_and_loses_little_of_the_new_one(
    model: Any, overlapping: list[Any]
) -> None:
    """b is the one that was trained again; a turns once more, and what earlier inputs get of the new rows falls."""
    often, last = (
        strategy_named("aimed", {"own_weight": 0.3, "again": 1.0, **more}) for more in ({}, {"aim_last": True})
    )
    first = model.learn(often, overlapping[:1])
    past = model.past(1, overlapping, first)
    trained = model.fit(often.lesson(past))
    before, after = (strategy.finish(past, trained) for strategy in (often, last))
    moments = past.inputs(first[0].served, [(1.0, overlapping[0])])
    left = {"before": 0.0, "after": 0.0}
    for site, pair in after.served.items():
        rank = first[0].served[site].rank
        assert torch.equal(pair.b, before.served[site].b)
        assert torch.equal(pair.a[:rank], before.served[site].a[:rank])
        for name, one in (("before", before), ("after", after)):
            left[name] += energy(Pair(one.served[site].a[rank:], one.served[site].b[:, rank:]), moments[site])
    assert left["after"] < 0.7 * left["before"]
    scores = [float(model.score(one.served, overlapping[1])) for one in (before, after)]
    assert scores[1] > scores[0] - 0.1
    assert after.notes["own_weight"] == 0.3 and after.notes["kept_on_own"] > before.notes["kept_on_own"]


def test_aiming_last_needs_something_to_come_in_between() -> None:
    with pytest.raises(ContinualPlanInvalid, match="aim_last needs again"):
        strategy_named("aimed", {"aim_last": True})
    with pytest.raises(ContinualPlanInvalid, match="aim_last is true or false, not 1"):
        strategy_named("aimed", {"again": 1, "aim_last": 1})


def test_it_reads_every_earlier_task_apart_and_the_text_by_its_weight(model: Any, overlapping: list[Any]) -> None:
    tasks = [*overlapping, overlapping[0][:30]]
    strategy = strategy_named("aimed", {"reads": 20, "own_weight": 2, "keep_weight": 0.5})
    outcomes = model.learn(strategy, tasks)
    assert [len(one.memory) for one in outcomes] == [20, 40, 60]
    asked: list[tuple[Factors, list[tuple[float, Any]]]] = []
    past = model.past(2, tasks, outcomes)

    def inputs(factors: Factors, groups: Sequence[tuple[float, Any]]) -> dict[str, Tensor]:
        asked.append((factors, list(groups)))
        found: dict[str, Tensor] = model.inputs(factors, groups)
        return found

    trained = model.fit(strategy.lesson(past))
    strategy.finish(type(past)(**{**vars(past), "inputs": inputs}), trained)
    (before, others), (now, own) = asked
    assert before is outcomes[1].served and now is trained
    assert [weight for weight, _ in others] == [1.0, 1.0, 0.5] and others[-1][1] is None
    for (_, rows), task in zip(others, overlapping, strict=False):
        assert len(rows) == 20 and set(rows) <= set(task)
    [(weight, rows)] = own
    assert weight == 1 and len(rows) == 20 and set(rows) <= set(tasks[2])


@pytest.mark.parametrize("seed", range(2))
def test_moments_are_those_of_what_the_matrices_read(
    seed: int, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one example at a time through transformers with the adapter merged into the weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training.encode import encode_all
    from training.finetune import stop_ids
    from training.template import training_template

    monkeypatch.setattr(trainable, "bfloat16_is_fast", lambda device: False)
    factors = fresh(tiny_base, seed)
    factors = joined(factors, {m: Pair(p.a, p.b * 20) for m, p in fresh(tiny_base, seed + 7).items()})
    write_factors(tmp_path, factors, "tiny-base")
    examples = [Example.of(user=f"{seed} {'more ' * n}", answer="yes" * (n + 1)) for n in range(11)]
    text = "A text of no task. " * 40

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    sums = {module: torch.zeros(pair.a.shape[1], pair.a.shape[1]) for module, pair in factors.items()}
    weight = 0.0
    for module, pair in factors.items():
        linear = model.get_submodule(module)
        linear.weight.data += pair.delta()

        def read(_: Any, given: tuple[Tensor, ...], module: str = module) -> None:
            x = given[0][0]
            sums[module] += weight * x.T @ x

        linear.register_forward_pre_hook(read)
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_base))
    encoded = encode_all(
        tokenizer, training_template(tokenizer), examples, stop_ids(tiny_base, tokenizer), 4096
    ).examples
    words = tokenizer(text, add_special_tokens=False).input_ids
    windows = [words[begin : begin + 256] for begin in range(0, len(words), 256)]
    with torch.no_grad():
        for share, rows in ((1.0, [one.input_ids for one in encoded]), (0.25, windows)):
            weight = share / sum(map(len, rows))
            for row in rows:
                model(torch.tensor([row]))
    found = input_moments(tiny_base, tmp_path, [(1.0, examples), (0.25, text)], quantized=False)
    assert found.keys() == factors.keys()
    for module, exact in sums.items():
        assert torch.allclose(found[module], exact, atol=1e-4 * float(exact.abs().max()))
    assert input_moments(tiny_base, tmp_path, [], quantized=False) == {}


def test_of_a_long_text_the_first_64_windows_are_read(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_factors(tmp_path, fresh(tiny_base, 0), "tiny-base")
    words = "".join(random.Random(5).choices("abcdefgh ", k=70 * 256))  # as many tokens
    count = len(AutoTokenizer.from_pretrained(str(tiny_base))(words, add_special_tokens=False).input_ids)
    assert count > 64 * 256
    read = [
        input_moments(tiny_base, tmp_path, [(1.0, text)], quantized=False)
        for text in (words, words[: 64 * 256], words[: 16 * 256])
    ]
    for module, whole in read[0].items():
        assert torch.equal(whole, read[1][module]) and not torch.equal(whole, read[2][module])


def test_moments_of_a_quantized_base_are_what_qlora_trains_on(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the NF4 base without an adapter, one example at a time; the adapter here adds nothing."""
    from transformers import AutoTokenizer

    from training.encode import encode_all
    from training.finetune import stop_ids
    from training.template import training_template

    monkeypatch.setattr(trainable, "bfloat16_is_fast", lambda device: False)
    write_factors(tmp_path, {m: Pair(p.a, p.b * 0) for m, p in fresh(tiny_base, 3).items()}, "tiny-base")
    examples = [Example.of(user=f"question {n}", answer="yes " * (n + 1)) for n in range(5)]
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_base))
    encoded = encode_all(
        tokenizer, training_template(tokenizer), examples, stop_ids(tiny_base, tokenizer), 4096
    ).examples
    model: Any = trainable.load_base(tiny_base, "qlora", 4096, "cpu", torch.float32)
    name, seen = "model.layers.1.self_attn.v_proj", []
    model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    with torch.no_grad():
        for one in encoded:
            model(torch.tensor([one.input_ids]))
    x = torch.cat(seen)
    exact = x.T @ x / len(x)
    found, whole = (
        input_moments(tiny_base, tmp_path, [(1.0, examples)], quantized=quantized)[name] for quantized in (True, False)
    )
    assert torch.allclose(found, exact, atol=1e-4 * float(exact.abs().max()))
    assert float((whole - exact).norm() / exact.norm()) > 0.01  # not the same as without NF4


def test_the_scorer_reads_the_text_to_keep_where_there_is_one(tiny_base: Path, tmp_path: Path) -> None:
    from training.continual.scoring import EngineScorer

    write_factors(tmp_path, fresh(tiny_base, 4), "tiny-base")
    examples = [Example.of(user="question", answer="yes")]
    groups: list[tuple[float, Any]] = [(1.0, examples), (0.5, None)]
    without = EngineScorer("tiny", tiny_base, ())
    found = EngineScorer("tiny", tiny_base, (), keep_text="A text of no task. " * 9).inputs(tmp_path, groups)
    alone = without.inputs(tmp_path, groups)
    for module, moments in without.inputs(tmp_path, groups[:1]).items():
        assert torch.equal(alone[module], moments)
        assert float((found[module] - moments).diagonal().min()) >= -1e-6
        assert float((found[module] - moments).trace()) > 0.1 * float(moments.trace())
    assert without.inputs(tmp_path, [(1.0, None)]) == {}


def test_examples_too_long_to_read_are_left_out(tiny_base: Path, tmp_path: Path) -> None:
    from training.answer_loss import LONGEST
    from training.continual.scoring import EngineScorer

    write_factors(tmp_path, fresh(tiny_base, 4), "tiny-base")
    short = tuple(Example.of(user=f"question {n}", answer="yes") for n in range(5))
    mixed = (*short[:2], Example.of(user="too long " * LONGEST, answer="yes"), *short[2:])
    assert readable(tiny_base, mixed) == short == readable(tiny_base, short)
    found = input_moments(tiny_base, tmp_path, [(1.0, mixed)], quantized=False)
    for module, moments in input_moments(tiny_base, tmp_path, [(1.0, short)], quantized=False).items():
        assert torch.equal(found[module], moments)
    [losses] = EngineScorer("tiny", tiny_base, ()).losses([tmp_path], mixed)
    assert [math.isnan(one) for one in losses] == [one not in short for one in mixed]


@pytest.mark.parametrize("name", ["aimed", "paced-replay"])
def test_only_what_can_be_read_is_sampled(name: str, model: Any, overlapping: list[Any]) -> None:
    """And where everything can be, the sample is the one that it always was."""
    strategy = strategy_named(name, {"judges": 8})
    outcomes = model.learn(strategy, overlapping[:1])
    past = model.past(1, overlapping, outcomes)
    trained = model.fit(strategy.lesson(past))
    asked: list[Any] = []

    def losses(adapters: Any, rows: Any) -> list[list[float]]:
        asked.extend(rows)
        return model.losses(adapters, rows)  # type: ignore[no-any-return]

    strategy.finish(replace(past, losses=losses), trained)
    usual, banned = set(asked), asked[-1]
    asked.clear()
    strategy.finish(replace(past, losses=losses, readable=lambda rows: [r for r in rows if r != banned]), trained)
    assert banned not in asked and len(usual & set(asked)) == len(usual) - 1
