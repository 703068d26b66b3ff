"""Field F1 of objects of any shape, against a reference that shares nothing with it."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from training.data import Example
from training.errors import DataInvalid
from training.metrics import micro_f1
from training.tasks import task_named
from training.tasks.json_answers import fields_of


def score(wanted: Any, given: str) -> float:
    return task_named("own-json").score([Example.of(user="q", answer=json.dumps(wanted))], [given])["field_f1"]


def leaves(value: Any, at: str = "") -> list[str]:
    """Every place and value as a text of its own, the places joined by a sign that no key of the test has."""
    if isinstance(value, dict) and value:
        return [leaf for key in value for leaf in leaves(value[key], f"{at}/{key}")]
    if isinstance(value, list) and value:
        return [f"{at}/* {canonical(one)}" for one in value]
    return [f"{at} {canonical(value)}"]


def canonical(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    return f"{type(value).__name__}:{value}"


def reference(wanted: list[Any], given: list[Any]) -> float:
    """F1 by crossing out: each value given is held against those wanted and not yet found."""
    hits = total = 0
    for w, g in zip(wanted, given, strict=True):
        left = leaves(w)
        total += len(left)
        for leaf in leaves(g):
            total += 1
            if leaf in left:
                left.remove(leaf)
                hits += 1
    return 2 * hits / total


@pytest.mark.parametrize("seed", range(8))
def test_field_f1_is_that_of_crossing_out(seed: int) -> None:
    generator = random.Random(seed)

    def value(depth: int) -> Any:
        kind = generator.randrange(8 if depth else 5)
        if kind < 5:
            return ["x", "1", 1, True, None][kind]
        if kind == 5:
            return [value(depth - 1) for _ in range(generator.randrange(4))]
        return {name: value(depth - 1) for name in generator.sample("abc", generator.randrange(4))}

    def record() -> dict[str, Any]:
        return {name: value(2) for name in "abcd"}

    wanted = [record() for _ in range(30)]
    given = [{**w, **{name: value(2) for name in generator.sample("abcd", 2)}} for w in wanted]
    assert micro_f1(list(map(fields_of, wanted)), list(map(fields_of, given))).value == pytest.approx(
        reference(wanted, given)
    )
    examples = [Example.of(user="q", answer=json.dumps(one)) for one in wanted]
    scores = task_named("own-json").score(examples, [json.dumps(one) for one in given])
    assert scores["field_f1"] == pytest.approx(reference(wanted, given)) and scores["field_f1"] < 1
    assert task_named("own-json").score(examples, [example.answer for example in examples])["field_f1"] == 1


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        ({"zip": "94107"}, '{"zip": 94107}'),
        ({"active": True}, '{"active": "true"}'),
        ({"active": True}, '{"active": 1}'),
        ({"note": None}, '{"note": "null"}'),
        ({"tags": []}, "utter nonsense"),
        ({"tags": []}, "{}"),
        ({}, "nonsense"),
        ({"a": {"b": 1}}, '{"a.b": 1}'),
        ({"a": ["x"]}, '{"a": "x"}'),
        ({"all": [{"id": "A", "n": 1}, {"id": "B", "n": 2}]}, '{"all": [{"id": "B", "n": 1}, {"id": "A", "n": 2}]}'),
    ],
)  # fmt: skip
def test_what_is_wrong_altogether_scores_nothing(wanted: Any, given: str) -> None:
    assert score(wanted, given) == 0
    assert score(wanted, json.dumps(wanted)) == 1


def test_what_does_not_matter() -> None:
    wanted = {"price": 5, "tags": ["a", "b"], "name": "Jane", "items": [{"sku": "A", "n": 1}]}
    assert score(wanted, '{"items":[{"n":1.0,"sku":" A"}],"name":" Jane ","tags":["b","a"],"price":5.0}') == 1
    assert score({"tags": ["a", "a"]}, '{"tags": ["a"]}') == pytest.approx(2 / 3)
    assert fields_of({"a": [1, 1]}) == Counter({(('"a"', "[]"), "1"): 2})
    assert score(wanted, '{"a":' * 900 + "1" + "}" * 900) == 0


def test_examples_that_could_not_be_scored_are_refused_before_any_answer() -> None:
    for name in ("own-json", "address-json", "name-json", "iam-policy"):
        with pytest.raises(DataInvalid, match="example 2"):
            task_named(name).check([Example.of(user="q", answer=answer) for answer in ("{}", "billing")])
    with pytest.raises(DataInvalid, match="example 1"):
        task_named("nl-awscli").check([Example.of(user="q", answer="billing")])
    task_named("nl-awscli").check([Example.of(user="q", answer="aws s3 ls")])
