"""Search, lineage and diff, over both catalog engines."""

from __future__ import annotations

import fnmatch
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hub.diff import changes
from hub.errors import QueryInvalid
from hub.facts import Facts
from hub.hub import Hub
from hub.search import MetricTest, Query, metric_numbers
from tests.hub.making import bf16, f32, key, lora_tensors, write_adapter


def push(hub: Hub, tmp_path: Path, name: str, seed: int, base: str = "tiny", **metrics: Any) -> None:
    directory = write_adapter(
        tmp_path / f"{name.replace('/', '-')}-{seed}",
        config={"base_model_name_or_path": base},
        tensors=lora_tensors(seed=seed),
    )
    Facts(metrics=metrics).write(directory)
    hub.push(directory, name)


def texts(hub: Hub, query: Query) -> list[str]:
    page = hub.search(query)
    assert not page.more
    return [version.text for version in page.versions]


def test_search_by_base_alias_and_metric(hub: Hub, tmp_path: Path) -> None:
    push(hub, tmp_path, "team/a", 1, f1=0.7, test={"loss": 1.5})
    push(hub, tmp_path, "team/a", 2, f1=0.9, test={"loss": 0.5})
    push(hub, tmp_path, "b", 3, base="other", f1=0.8)
    hub.tag("team/a@1", "prod")
    hub.split([("team/a@1", 1), ("team/a@2", 1)], "canary")

    def metric(*tests: str) -> Query:
        return Query(metrics=tuple(map(MetricTest.parse, tests)))

    assert texts(hub, metric("f1>0.7")) == ["b@1", "team/a@2"]
    assert texts(hub, metric("f1 >= 0.7", "test.loss < 1")) == ["team/a@2"]
    assert texts(hub, metric("f1 == 0.8")) == texts(hub, metric("f1=0.8")) == ["b@1"]
    assert texts(hub, metric("f1 != 0.8")) == ["team/a@1", "team/a@2"]
    assert texts(hub, metric("nope > 0")) == []
    assert texts(hub, Query(base="other")) == ["b@1"]
    assert texts(hub, Query(base="oth")) == []
    assert texts(hub, Query(tag="prod")) == ["team/a@1"]
    assert texts(hub, Query(tag="canary")) == ["team/a@1", "team/a@2"]
    assert texts(hub, Query(newest=True)) == ["b@1", "team/a@2"]
    assert texts(hub, Query(newest=True, tag="prod")) == []
    page = hub.search(Query("team/*"))
    assert [page.aliases[version.digest] for version in page.versions] == [("canary", "prod"), ("canary", "latest")]
    hub.untag("team/a", "canary")
    hub.tag("team/a@1", "latest")
    hub.remove("team/a@2")
    assert texts(hub, Query(newest=True)) == ["b@1", "team/a@1"]


def test_pages_join_to_the_whole_in_the_order_of_code_points(hub: Hub, tmp_path: Path) -> None:
    dice = random.Random(5)
    names = ["a", "a-b", "a.b", "a/b", "a0", "a_b", "ab", "b/a", "b-a/c"]  # languages sort these otherwise
    for seed in range(18):
        push(hub, tmp_path, dice.choice(names), seed)
    everything = [(version.full_name, version.number) for version in hub.versions()]
    assert everything == sorted(everything)
    for pattern in (None, "a*", "a?b", "[ab]*", "a", "*/*", "zzz", "a/*", "?", "*", "[aä]*", "\U0010ffff*", "\ud7ff*"):
        matching = [item for item in everything if pattern is None or fnmatch.fnmatchcase(item[0], pattern)]
        for limit in (1, 4, 18, 100):
            found: list[tuple[str, int]] = []
            query = Query(pattern, limit=limit)
            while True:
                page = hub.search(query)
                assert len(page.versions) <= limit
                found += [(version.full_name, version.number) for version in page.versions]
                if not page.more:
                    break
                query = Query(pattern, limit=limit, after=found[-1])
            assert found == matching


@pytest.mark.parametrize(
    "text", ["", "f1", "f1 >", ">1", "f1 ~ 1", "f1 > x", "f1 > nan", "f1 > inf", "a b > 1", "f1>1>2"]
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(QueryInvalid):
        MetricTest.parse(text)


def test_metrics_that_a_condition_can_name() -> None:
    metrics = {"f1": 1, "on": True, "text": "x", "deep": {"er": {"x": 0.5}}, "a b": 1, "nul\0": 1, "list": [1]}
    assert dict(metric_numbers(metrics)) == {"f1": 1.0, "deep.er.x": 0.5}


def test_strange_names_in_facts_reach_no_database(hub: Hub, tmp_path: Path) -> None:
    """PostgreSQL takes no NUL in text."""
    push(hub, tmp_path, "x", 1, **{"nul\0l": 1.0, "\N{PILE OF POO}": 2.0})
    assert hub.resolve("x").manifest.metrics["nul\0l"] == 1.0
    assert hub.fsck() == []


def test_lineage_goes_back_and_forth(hub: Hub, tmp_path: Path) -> None:
    parents: dict[int, list[str]] = {1: [], 2: ["x@1"], 3: ["x@1"], 4: ["x@2", "x@3"], 5: ["x@4"]}
    for seed, refs in parents.items():
        directory = write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed))
        hub.push(directory, "x", parents=refs)
    family = hub.lineage("x@4")
    assert [(step.version and step.version.number, step.distance) for step in family.ancestors] == [
        (2, 1), (3, 1), (1, 2),
    ]  # fmt: skip
    assert [child.number for child in family.children] == [5]
    assert hub.diff("x@2", "x@3").relation == "A and B come from x@1 (1 and 1 steps back)"
    assert hub.diff("x@4", "x@5").relation == "A is a parent of B"
    assert hub.diff("x@5", "x@1").relation == "B is an ancestor, 3 steps back, of A"
    assert hub.diff("x@5", "x@5").relation == "A and B are the same version"
    hub.tag("x@5", "latest")
    hub.remove("x@1")
    (gone,) = [step for step in hub.lineage("x@4").ancestors if step.distance == 2]
    assert gone.version is None


def test_diff_tells_norms_cosines_and_what_the_products_do(hub: Hub, tmp_path: Path) -> None:
    random_ = np.random.default_rng(7)
    name_a, name_b = key("q_proj", "lora_A.weight"), key("q_proj", "lora_B.weight")
    one, other = lora_tensors(seed=1), lora_tensors(seed=1)
    a, b = random_.normal(size=(4, 16)), random_.normal(size=(16, 4))
    mix = random_.normal(size=(4, 4))
    one[name_a], one[name_b] = f32(a), f32(b)
    # The same product in other factors.
    other[name_a], other[name_b] = f32(np.linalg.inv(mix) @ a), f32(b @ mix)
    hub.push(write_adapter(tmp_path / "a", tensors=one), "x")
    hub.push(write_adapter(tmp_path / "b", tensors=other, config={"lora_alpha": 16}), "x")
    found = hub.diff("x@1", "x@2")
    assert found.config == {"lora_alpha": (8, 16)}
    assert [tensor.name for tensor in found.tensors] == [name_a, name_b]
    assert found.same_tensors == 6
    changed = np.linalg.inv(mix) @ a
    first = found.tensors[0]
    assert first.norm_a == pytest.approx(np.linalg.norm(a), rel=1e-5)
    assert first.cosine == pytest.approx(np.vdot(a, changed) / np.linalg.norm(a) / np.linalg.norm(changed), rel=1e-4)
    assert first.change == pytest.approx(np.linalg.norm(changed - a), rel=1e-4)
    module = "model.layers.0.self_attn.q_proj"
    (delta,) = [delta for delta in found.deltas if delta.module == module]
    assert delta.cosine == pytest.approx(1, abs=1e-5)
    assert delta.norm_a == pytest.approx(np.linalg.norm(2 * b @ a), rel=1e-4)  # alpha / r = 8 / 4
    assert delta.norm_b == pytest.approx(2 * delta.norm_a, rel=1e-4)
    assert len(found.deltas) == 4  # alpha changed what every module adds


def test_diff_of_other_shapes_types_and_modules(hub: Hub, tmp_path: Path) -> None:
    one = lora_tensors(seed=1)
    other = lora_tensors(seed=1, rank=2)
    raw = np.frombuffer(one[key("v_proj", "lora_A.weight", 1)][2], "<f4").reshape(4, 16)
    half = {**one, key("v_proj", "lora_A.weight", 1): bf16(raw)}
    hub.push(write_adapter(tmp_path / "a", tensors=one), "x")
    hub.push(write_adapter(tmp_path / "b", tensors=other, config={"r": 2}), "x")
    hub.push(write_adapter(tmp_path / "c", tensors=half), "x")
    ranks = hub.diff("x@1", "x@2")
    assert all(tensor.cosine is None and tensor.norm_a and tensor.norm_b for tensor in ranks.tensors)
    assert all(delta.cosine is not None for delta in ranks.deltas)  # products have the base's shape
    (tensor,) = hub.diff("x@1", "x@3").tensors
    assert tensor.cosine == pytest.approx(1, abs=1e-3)
    fewer = {name: value for name, value in one.items() if ".layers.0." in name}
    hub.push(write_adapter(tmp_path / "d", tensors=fewer, config={"layers_to_transform": [0]}), "x")
    left = hub.diff("x@1", "x@4")
    assert {(tensor.norm_b, tensor.cosine) for tensor in left.tensors} == {(None, None)}
    assert {delta.norm_b for delta in left.deltas if ".layers.1." in delta.module} == {None}


def test_changes_are_told_by_path() -> None:
    a = {"rate": 1e-4, "deep": {"x": 1, "same": 0}, "sets": [{"name": "imdb", "rows": 1}, {"rows": 2}]}
    b = {"rate": 2e-4, "deep": {"y": 1, "same": 0}, "sets": [{"name": "imdb", "rows": 9}, {"rows": 2}]}
    assert changes(a, b) == {
        "rate": (1e-4, 2e-4), "deep.x": (1, None), "deep.y": (None, 1), "sets[imdb].rows": (1, 9),
    }  # fmt: skip
    assert changes([{"name": "a"}], []) == {"[a].name": ("a", None)}
    assert json.dumps(changes({"x": None}, {}))


@pytest.mark.parametrize("text", ["\udcff", "a\ud800*", "a\0b"])
def test_what_is_no_text_is_no_question(text: str) -> None:
    for field in ("pattern", "base", "tag"):
        with pytest.raises(QueryInvalid, match="is no text in UTF-8"):
            Query(**{field: text})
