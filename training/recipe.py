"""A recipe: every number of a training run in one frozen value. The named ones are in `training.presets`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from training.errors import RecipeInvalid


@dataclass(frozen=True)
class Recipe:
    """The settings of one run. Training every weight uses all but the LoRA fields, see `for_every_weight`."""

    name: str
    source: str  # where the numbers come from
    when: str  # what it is meant for
    method: str = "lora"  # what the numbers are made for: "lora", "qlora" or "full"; `hub train --method` overrides it
    rank: int = 16
    alpha: int = 32  # the delta is scaled by alpha / rank
    dropout: float = 0.05  # on the adapter's input
    targets: tuple[str, ...] = ()  # module names; empty = every linear of the decoder but the output head
    variant: str = "plain"  # "plain"; "rslora": scaled by alpha / sqrt(rank); "dora": magnitudes trained apart
    init: str = "random"  # of the adapter: "random" (a; b is zero); "qera": what NF4 took from the base, for "qlora"
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
    precision: str = "auto"  # of the products: "bfloat16", "float32", or bfloat16 exactly where hardware does it
    seed: int = 0

    def __post_init__(self) -> None:
        for field, (low, high) in _BOUNDS.items():
            value = getattr(self, field)
            _check_number(field, value)
            if not (math.isfinite(value) and low <= value <= high):
                raise RecipeInvalid(f"{field.replace('_', ' ')} must lie between {low:g} and {high:g}, not {value:g}")
        if not isinstance(self.gradient_checkpointing, bool):
            raise RecipeInvalid(f"gradient checkpointing must be true or false, not {self.gradient_checkpointing!r}")
        if not isinstance(self.targets, tuple) or not all(isinstance(name, str) and name for name in self.targets):
            raise RecipeInvalid(f"targets must be a list of module names, not {self.targets!r}")
        if self.method not in _METHODS:
            raise RecipeInvalid(f"method must be one of {', '.join(_METHODS)}, not {self.method}")
        if self.precision not in PRECISIONS:
            raise RecipeInvalid(f"precision must be one of {', '.join(PRECISIONS)}, not {self.precision}")
        if self.variant not in VARIANTS:
            raise RecipeInvalid(f"variant must be one of {', '.join(VARIANTS)}, not {self.variant}")
        if self.init not in INITS:
            raise RecipeInvalid(f"init must be one of {', '.join(INITS)}, not {self.init}")
        if self.schedule not in SCHEDULES:
            raise RecipeInvalid(f"schedule must be one of {', '.join(SCHEDULES)}, not {self.schedule}")

    def but(self, **changes: Any) -> Recipe:
        """This recipe with some values replaced; None leaves a value as it is. Raises `RecipeInvalid`."""
        return replace(self, **{field: value for field, value in changes.items() if value is not None})

    def for_every_weight(self) -> Recipe:
        """This recipe for full fine-tuning: a tenth of the rate that suits adapters ("LoRA Without Regret").

        A recipe made for full fine-tuning is left as it is.
        """
        if self.method == "full":
            return self
        return replace(self, method="full", learning_rate=self.learning_rate / 10)

    @property
    def step_batch(self) -> int:
        """Sequences in one optimizer step."""
        return self.batch * self.accumulation

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file.

        An "auto" precision and a "random" beginning are left out: results from before there was a choice keep their
        names.
        """
        told = {**asdict(self), "targets": list(self.targets)}
        return {name: value for name, value in told.items() if value != _SINCE.get(name)}


def _check_number(field: str, value: object) -> None:
    """Raise `RecipeInvalid` unless it is a number of the field's kind; plans in YAML may hold anything."""
    name = field.replace("_", " ")
    if isinstance(value, str):
        hint = "; YAML takes 1e-3 for a text, and 1.0e-3 for a number" if "e" in value.lower() else ""
        raise RecipeInvalid(f"{name} must be a number, not the text {value!r}{hint}")
    if field in _WHOLE and type(value) is not int:
        raise RecipeInvalid(f"{name} must be a whole number, not {value!r}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeInvalid(f"{name} must be a number, not {value!r}")


_METHODS = ("lora", "qlora", "full")
_WHOLE = frozenset({"rank", "alpha", "batch", "accumulation", "max_length", "seed"})
_SINCE = {"precision": "auto", "init": "random"}
SCHEDULES = ("cosine", "linear", "constant_with_warmup")
VARIANTS = ("plain", "rslora", "dora")
INITS = ("random", "qera")
PRECISIONS = ("auto", "bfloat16", "float32")
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
