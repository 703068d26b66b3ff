from __future__ import annotations

import dataclasses

import pytest

from training.errors import RecipeInvalid, UnknownRecipe
from training.recipe import RECIPES, named_recipe


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
        {"hold_out": 0.9},
        {"batch": -1},
    ],
)
def test_values_that_cannot_be_are_refused_by_name(changes: dict[str, object]) -> None:
    with pytest.raises(RecipeInvalid, match=next(iter(changes)).replace("_", " ")):
        named_recipe("recommended").but(**changes)


def test_every_weight_is_trained_at_a_tenth_of_the_rate() -> None:
    recipe = named_recipe("recommended")
    full = recipe.for_every_weight()
    assert full.learning_rate == pytest.approx(2e-5)
    assert full.but(learning_rate=recipe.learning_rate) == recipe


def test_every_recipe_says_where_it_comes_from_and_when_to_use_it() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        assert recipe.source and recipe.when
    with pytest.raises(UnknownRecipe, match="recommended"):
        named_recipe("best")
