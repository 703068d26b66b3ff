from __future__ import annotations

import dataclasses

import pytest

from training.errors import RecipeInvalid, UnknownRecipe
from training.presets import RECIPES, named_recipe


def test_the_recommended_recipe_is_what_the_guides_agree_on() -> None:
    recipe = named_recipe("recommended")
    assert (recipe.rank, recipe.alpha, recipe.targets, recipe.learning_rate) == (16, 32, (), 2e-4)
    assert (recipe.schedule, recipe.warmup) == ("cosine", 0.03)


def test_a_recipe_cannot_be_changed_only_replaced() -> None:
    recipe = named_recipe("demo")
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.rank = 3  # type: ignore[misc]
    other = recipe.but(rank=3, alpha=None)
    assert (other.rank, other.alpha, recipe.rank) == (3, recipe.alpha, 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 0},
        {"learning_rate": float("nan")},
        {"dropout": 1.0},
        {"schedule": "step"},
        {"precision": "int8"},
        {"init": "pissa"},
        {"method": "prompt"},
        {"hold_out": 0.9},
        {"batch": -1},
    ],
)
def test_values_that_cannot_be_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(RecipeInvalid, match=next(iter(changes)).replace("_", " ")):
        named_recipe("recommended").but(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"learning_rate": "1e-3"}, "learning rate must be a number, not the text '1e-3'.*1.0e-3"),
        ({"rank": 8.5}, "rank must be a whole number, not 8.5"),
        ({"batch": 2.5}, "batch must be a whole number"),
        ({"batch": True}, "batch must be a whole number"),
        ({"warmup": False}, "warmup must be a number"),
        ({"epochs": [1]}, "epochs must be a number"),
        ({"gradient_checkpointing": "no"}, "gradient checkpointing must be true or false, not 'no'"),
        ({"targets": "q_proj"}, "targets must be a list of module names"),
        ({"targets": (1,)}, "targets must be a list of module names"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(changes: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeInvalid, match=says):
        named_recipe("recommended").but(**changes)
    assert named_recipe("demo").but(epochs=1).as_dict()["epochs"] == 1


def test_every_weight_is_trained_at_a_tenth_of_the_rate() -> None:
    recipe = named_recipe("recommended")
    full = recipe.for_every_weight()
    assert full.learning_rate == pytest.approx(2e-5)
    assert full.method == "full" and full.for_every_weight() == full
    assert full.but(learning_rate=recipe.learning_rate, method="lora") == recipe


def test_every_recipe_says_where_it_comes_from_and_when_to_use_it() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.source and recipe.when
    with pytest.raises(UnknownRecipe, match="recommended"):
        named_recipe("best")


# Figures of the articles, written down here a second time: a preset that drifts from its source fails.
SAID = {
    "article-000": {"rank": 32, "alpha": 64, "dropout": 0.05, "learning_rate": 2e-4, "warmup": 0.03, "epochs": 3.0,
                    "batch": 4, "accumulation": 8, "weight_decay": 0.01, "clip": 1.0},
    "article-001": {"method": "qlora", "rank": 8, "alpha": 32, "dropout": 0.05,
                    "targets": ("q_proj", "k_proj", "v_proj", "o_proj")},
    "article-003": {"rank": 16, "alpha": 32, "schedule": "cosine", "warmup": 0.03, "epochs": 3.0, "batch": 4,
                    "accumulation": 4, "max_length": 2048, "learning_rate": 2e-4, "targets": ()},
    "article-004": {"rank": 16, "alpha": 32, "dropout": 0.1, "warmup": 0.1, "learning_rate": 2e-4, "batch": 4,
                    "accumulation": 4, "epochs": 3.0},
    "conservative": {"rank": 4, "alpha": 8, "targets": ("q_proj", "v_proj"), "learning_rate": 1e-4},
    "aggressive": {"rank": 64, "alpha": 128, "targets": (), "learning_rate": 3e-4},
    "qlora-small-gpu": {"method": "qlora", "gradient_checkpointing": True},
    "generation": {"rank": 64, "alpha": 128, "targets": (), "batch": 4, "accumulation": 4},
    "classification": {"rank": 8, "alpha": 16, "targets": ()},
    "low-data": {"learning_rate": 1e-4, "epochs": 3.0, "dropout": 0.1, "hold_out": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", list(SAID))
def test_a_preset_says_what_its_source_says(name: str) -> None:
    recipe = dataclasses.asdict(named_recipe(name))
    assert {field: recipe[field] for field in SAID[name]} == SAID[name]


def test_what_the_issue_names_is_there() -> None:
    assert set(RECIPES) >= {*SAID, "recommended"}


def test_an_adapters_usual_beginning_leaves_no_trace_in_what_is_kept() -> None:
    recipe = named_recipe("demo")
    assert recipe.init == "random" and "init" not in recipe.as_dict()
    assert recipe.but(init="qera").as_dict() == recipe.as_dict() | {"init": "qera"}


def test_an_open_precision_leaves_no_trace_in_what_is_kept() -> None:
    """Results from before there was a choice are found by a digest of these values."""
    recipe = named_recipe("demo")
    assert recipe.precision == "auto" and "precision" not in recipe.as_dict()
    assert recipe.but(precision="float32").as_dict() == recipe.as_dict() | {"precision": "float32"}
