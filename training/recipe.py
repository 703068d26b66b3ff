"""Recipes: every number of a training run in one frozen value, and a few named ones with their sources."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from training.errors import RecipeInvalid, UnknownRecipe


@dataclass(frozen=True)
class Recipe:
    """The settings of one run. Training every weight uses all but the four LoRA fields, see `for_every_weight`."""

    name: str
    source: str  # where the numbers come from
    when: str  # what it is meant for
    rank: int = 16
    alpha: int = 32  # the delta is scaled by alpha / rank
    dropout: float = 0.05  # on the adapter's input
    targets: tuple[str, ...] = ()  # module names; empty = every linear of the decoder but the output head
    learning_rate: float = 2e-4
    schedule: str = "cosine"  # "cosine", "linear" or "constant_with_warmup"
    warmup: float = 0.03  # fraction of all steps
    epochs: float = 3.0
    batch: int = 8  # sequences in one forward
    accumulation: int = 1  # forwards in one optimizer step
    max_length: int = 1024  # tokens; longer examples are left out and counted, never cut
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradient
    hold_out: float = 0.05  # fraction of the examples kept for the validation loss
    gradient_checkpointing: bool = False  # trades about a third of the speed for memory
    seed: int = 0

    def __post_init__(self) -> None:
        for field, (low, high) in _BOUNDS.items():
            value = getattr(self, field)
            if not (math.isfinite(value) and low <= value <= high):
                raise RecipeInvalid(f"{field.replace('_', ' ')} must lie between {low:g} and {high:g}, not {value:g}")
        if self.schedule not in _SCHEDULES:
            raise RecipeInvalid(f"schedule must be one of {', '.join(_SCHEDULES)}, not {self.schedule}")

    def but(self, **changes: Any) -> Recipe:
        """This recipe with some values replaced; None leaves a value as it is. Raises `RecipeInvalid`."""
        return replace(self, **{field: value for field, value in changes.items() if value is not None})

    def for_every_weight(self) -> Recipe:
        """This recipe for full fine-tuning: a tenth of the rate that suits adapters ("LoRA Without Regret")."""
        return replace(self, learning_rate=self.learning_rate / 10)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {**asdict(self), "targets": list(self.targets)}


_SCHEDULES = ("cosine", "linear", "constant_with_warmup")
_BOUNDS: dict[str, tuple[float, float]] = {
    "rank": (1, 1024),
    "alpha": (1, 8192),
    "dropout": (0, 0.9),
    "learning_rate": (1e-9, 1),
    "warmup": (0, 0.5),
    "epochs": (1e-3, 1000),
    "batch": (1, 4096),
    "accumulation": (1, 4096),
    "max_length": (8, 1_048_576),
    "weight_decay": (0, 10),
    "clip": (1e-6, 1e6),
    "hold_out": (0, 0.5),
    "seed": (0, 2**32 - 1),
}

RECOMMENDED = Recipe(
    name="recommended",
    source="the values on which published LoRA guides agree: alpha twice the rank, all linears, 2e-4, cosine",
    when="a first adapter on 1,000 to 50,000 examples; r 32 to 64 when quality still grows",
)

ARTICLE_000 = Recipe(
    name="article-000",
    source="article 000, three production tasks on LLaMA-2-7B: r 32, alpha 64, seven projections, batch 4 x 8",
    when="repeating that article's LoRA runs, or a production adapter on thousands of long examples",
    rank=32,
    alpha=64,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    batch=4,
    accumulation=8,
)

DEMO = Recipe(
    name="demo",
    source="measured here: SmolLM2-135M on two CPU cores",
    when="one to two minutes a task on a laptop: one pass, a higher rate to make up for the few steps",
    dropout=0.0,
    learning_rate=1e-3,
    warmup=0.05,
    epochs=1.0,
    max_length=224,
)

RECIPES = {recipe.name: recipe for recipe in (RECOMMENDED, ARTICLE_000, DEMO)}


def named_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises `UnknownRecipe`, listing those there are."""
    try:
        return RECIPES[name]
    except KeyError:
        raise UnknownRecipe(f"no recipe is called {name!r}; there are: {', '.join(RECIPES)}") from None
