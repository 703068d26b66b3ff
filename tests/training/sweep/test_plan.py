"""Plans: what they make of YAML, and what they refuse by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from training.errors import PlanInvalid
from training.presets import named_recipe
from training.sweep.plan import SweepPlan
from training.sweep.records import Records, TaskData

EXPERIMENTS = sorted((Path(__file__).parents[3] / "training" / "experiments").glob("[0-9]*.yaml"))
SMALL: dict[str, Any] = {
    "recipe": "demo",
    "set": {"epochs": 2.0},
    "tasks": {"sentiment": {}, "iam-policy": {"max_length": 512}},
    "variants": {"full": {"method": "full", "learning_rate": 1e-4}, "r4": {"rank": 4, "alpha": 8}},
    "grid": {"weight_decay": [0.0, 0.1]},
    "sizes": {
        "small": {
            "seeds": [3, 5],
            "data": {"sentiment": {"train": 8, "eval": 4}, "iam-policy": {"train": 9, "eval": 3}},
        }
    },
}


def test_cells_are_the_product_with_overrides_from_wide_to_narrow() -> None:
    plan = SweepPlan.parse(SMALL, "p", "small")
    assert len(plan.cells) == 2 * 2 * 2 * 2
    first = plan.cells[0]
    assert (first.task, first.variant, first.line) == ("sentiment", "full weight_decay=0", "full")
    assert first.recipe == named_recipe("demo").but(
        epochs=2.0, method="full", learning_rate=1e-4, weight_decay=0.0, seed=3
    )
    # A comparison at a time: all variants of one task and seed stand together.
    assert [(cell.recipe.seed, cell.task) for cell in plan.cells[::4]] == [
        (3, "sentiment"), (3, "iam-policy"), (5, "sentiment"), (5, "iam-policy"),
    ]  # fmt: skip
    assert {cell.recipe.max_length for cell in plan.cells if cell.task == "iam-policy"} == {512}


@pytest.mark.parametrize(
    ("change", "full", "lora"),
    [
        ({}, {1e-4}, {1e-3}),  # demo's, and a tenth of it, as `hub train --method full` takes
        ({"set": {"learning_rate": 5e-4}}, {5e-4}, {5e-4}),
        ({"tasks": {"sentiment": {"learning_rate": 5e-4}}}, {5e-4}, {5e-4}),
        ({"grid": {"learning_rate": [3e-4, 6e-4]}}, {3e-4, 6e-4}, {3e-4, 6e-4}),
    ],
)
def test_full_fine_tuning_takes_a_tenth_of_the_rate_unless_one_is_given(
    change: dict[str, Any], full: set[float], lora: set[float]
) -> None:
    plan = {**SMALL, "tasks": {"sentiment": {}}, "variants": {"full": {"method": "full"}, "r4": {"rank": 4}}}
    cells = SweepPlan.parse({**plan, **change}, "p", "small").cells
    for line, rates in (("full", full), ("r4", lora)):
        assert {cell.recipe.learning_rate for cell in cells if cell.line == line} == rates


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"variant": {}}, "unknown key 'variant'"),
        ({"tasks": {"poetry": {}}}, "no task 'poetry'"),
        ({"recipe": "mine"}, "no recipe"),
        ({"set": {"lr": 1}}, "'lr' is no field"),
        ({"set": {"seed": 1}}, "'seed' is no field"),
        ({"variants": {"a": {"rank": 0}}}, "rank must lie"),
        ({"variants": {"a": {"method": "magic"}}}, "method must be"),
        ({"variants": [1]}, "variants is no mapping"),
        ({"grid": {"rank": 4}}, "needs a list"),
        ({"grid": {"rank": [4, 8]}}, "r4 sets rank, which the grid varies"),
        ({"variants": {"a": {"rank": 4}, "b": {"rank": 4}}}, "a weight_decay=0 and b weight_decay=0 have the same"),
        ({"grid": {"epochs": [1.0, 2.0, 1]}}, "full epochs=1 and full epochs=1 have the same recipe for sentiment"),
        ({"reference": "r9"}, "no variant 'r9'"),
        ({"plot": {"x": "speed"}}, "'speed' is no field"),
        ({"sizes": {"large": {}}}, "no size 'small'"),
        ({"sizes": {"small": {**SMALL["sizes"]["small"], "seeds": [1, 1]}}}, "twice"),
        ({"sizes": {"small": {**SMALL["sizes"]["small"], "seeds": []}}}, "seeds needs"),
        ({"sizes": {"small": {"seeds": [0], "data": {"sentiment": {"train": 5, "eval": 0}}}}}, "train and eval"),
    ],
)
def test_what_is_no_plan_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanInvalid, match=words):
        SweepPlan.parse({**SMALL, **change}, "p", "small")


def test_what_is_no_yaml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    for text in ("a: [", "- 1", "!!python/object/apply:os.system [true]"):
        file.write_text(text)
        with pytest.raises(PlanInvalid):
            SweepPlan.read(file, "small")


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_the_shipped_plans_can_be_read_at_every_size(file: Path) -> None:
    sizes = yaml.safe_load(file.read_text())["sizes"]
    assert {"small", "large"} <= sizes.keys()
    for size in sizes:
        plan = SweepPlan.read(file, size)
        assert plan.title and plan.question and plan.name == file.stem
        assert len({cell.variant for cell in plan.cells}) >= 4
        for cell in plan.cells:  # each its own recipe
            assert sum(other.recipe == cell.recipe and other.task == cell.task for other in plan.cells) == 1


def test_the_shipped_plans_share_cells() -> None:
    keys: dict[str, set[str]] = {}
    data = TaskData(Path(), Path(), "sha256:1", "sha256:2")
    for file in EXPERIMENTS:
        plan = SweepPlan.read(file, "small")
        keys[file.stem] = {Records(Path()).key(cell, "base", data) for cell in plan.cells}
    first = keys["1-methods"]
    assert {other for other in keys if not first & keys[other]} == {"5-tuned", "6-iam-policies"}  # make two passes


def test_a_key_changes_with_everything_that_matters_and_nothing_else() -> None:
    records, data = Records(Path()), TaskData(Path("a"), Path("b"), "sha256:1", "sha256:2")
    cell = SweepPlan.parse(SMALL, "p", "small").cells[0]
    key = records.key(cell, "base", data)
    from dataclasses import replace

    assert records.key(replace(cell, variant="called otherwise"), "base", replace(data, train=Path("c"))) == key
    renamed = replace(cell.recipe, name="x", source="y", when="z")
    assert records.key(replace(cell, recipe=renamed), "base", data) == key
    others = [
        records.key(replace(cell, recipe=cell.recipe.but(learning_rate=2e-4)), "base", data),
        records.key(replace(cell, recipe=cell.recipe.but(seed=4)), "base", data),
        records.key(replace(cell, recipe=cell.recipe.but(method="lora")), "base", data),
        records.key(replace(cell, task="iam-policy"), "base", data),
        records.key(cell, "other", data),
        records.key(cell, "base", replace(data, train_digest="sha256:3")),
        records.key(cell, "base", replace(data, evaluation_digest="sha256:3")),
    ]
    assert len({key, *others}) == 8
