"""A sweep's plan, from YAML to cells.

title: …                        what the page is called
question: …                     what it is to answer
base: smollm2-135m
recipe: demo                    a named recipe; everything below overrides it; method full takes a tenth of its rate
set: {epochs: 1}                fields of every cell
tasks: {sentiment: {}, iam-policy: {max_length: 512}}       tasks, with fields of their own
variants: {full: {method: full, learning_rate: 1.0e-4}, lora-r16: {rank: 16, alpha: 32}}
grid: {learning_rate: [1.0e-4, 1.0e-3]}                     optional: every variant with every combination
reference: full                 optional: the variant that the others are compared with
sizes:
  small: {seeds: [0], data: {sentiment: {train: 240, eval: 100}, …}}
  whole: {seeds: [0, 1, 2], data: {…}}
plot: {x: learning_rate}        optional: scores over this field, one line a variant
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from training.errors import PlanInvalid, RecipeInvalid, UnknownRecipe
from training.presets import named_recipe
from training.recipe import Recipe
from training.tasks import MODULES

_KEYS = ("title", "question", "base", "recipe", "set", "tasks", "variants", "grid", "reference", "sizes", "plot")
_FIELDS = {field.name for field in fields(Recipe)} - {"name", "source", "when", "seed"}
MAX_CELLS = 10_000


@dataclass(frozen=True)
class DataSize:
    """How many examples of a task."""

    train: int
    evaluation: int


@dataclass(frozen=True)
class Cell:
    """One training run and its score."""

    task: str
    variant: str  # "lora-r16", with a grid "lora-r16 learning_rate=0.001"
    line: str  # the variant without the grid
    recipe: Recipe  # everything but the data, the method and the seed included

    @property
    def text(self) -> str:
        """As people read it."""
        return f"{self.task} · {self.variant} · seed {self.recipe.seed}"


@dataclass(frozen=True)
class SweepPlan:
    """A plan at one of its sizes."""

    name: str  # the file's, without its suffix
    title: str
    question: str
    base: str
    size: str
    data: Mapping[str, DataSize]  # by task
    cells: tuple[Cell, ...]  # by seed, then task, then variant: a sweep that is cut short has whole comparisons
    reference: str | None  # a variant
    x: str | None  # the recipe's field to plot over

    @classmethod
    def read(cls, path: Path, size: str) -> Self:
        """The plan in a file; raises `PlanInvalid`, naming the place."""
        import yaml

        try:
            value = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PlanInvalid(f"{path.name} is no YAML that can be read: {error}") from error
        return cls.parse(value, path.stem, size)

    @classmethod
    def parse(cls, value: Any, name: str, size: str) -> Self:
        """The plan in what YAML gave; raises `PlanInvalid`."""
        value = mapping(value, "the plan")
        if strange := [key for key in value if key not in _KEYS]:
            raise PlanInvalid(f"the plan has the unknown key {strange[0]!r}; known: {', '.join(_KEYS)}")
        tasks = {
            task: _overrides(given, f"tasks: {task}") for task, given in mapping(value.get("tasks"), "tasks").items()
        }
        for task in tasks:
            if task not in MODULES:
                raise PlanInvalid(f"tasks: there is no task {task!r}; there are: {', '.join(MODULES)}")
        sizes = mapping(value.get("sizes"), "sizes")
        if size not in sizes:
            raise PlanInvalid(f"the plan has no size {size!r}; it has: {', '.join(map(str, sizes))}")
        chosen = mapping(sizes[size], f"sizes: {size}")
        data = {task: data_size(chosen, task, size) for task in tasks}
        variants = _variants(value)
        reference = value.get("reference")
        if reference is not None and reference not in [variant for variant, _, _ in variants]:
            raise PlanInvalid(f"reference: there is no variant {reference!r}")
        plot = mapping(value.get("plot", {}), "plot")
        x = plot.get("x")
        if x is not None and x not in _FIELDS:
            raise PlanInvalid(f"plot: x: {x!r} is no field of a recipe")
        common = _overrides(value.get("set", {}), "set")
        cells = tuple(
            Cell(task, variant, line, _recipe(value, {**common, **tasks[task], **given}, seed, f"{task}: {variant}"))
            for seed in seeds_of(chosen.get("seeds"), size)
            for task in tasks
            for variant, line, given in variants
        )
        if not cells or len(cells) > MAX_CELLS:
            raise PlanInvalid(f"the plan makes {len(cells)} cells; 1 to {MAX_CELLS} are taken")
        _check_unlike(cells)
        return cls(
            name, str(value.get("title", name)), str(value.get("question", "")), str(value.get("base", "smollm2-135m")),
            size, data, cells, reference, x,
        )  # fmt: skip


def _variants(value: Mapping[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, name without the grid, overrides) of every variant at every point of the grid."""
    grid = mapping(value.get("grid", {}), "grid")
    for field, points in grid.items():
        _overrides({field: None}, "grid")
        if not isinstance(points, list) or not points:
            raise PlanInvalid(f"grid: {field} needs a list of values")
    combinations = [dict(zip(grid, points, strict=True)) for points in itertools.product(*grid.values())]
    found = []
    for line, given in mapping(value.get("variants"), "variants").items():
        own = _overrides(given, f"variants: {line}")
        if both := [field for field in own if field in grid]:
            raise PlanInvalid(f"variants: {line} sets {both[0]}, which the grid varies; take it out of one of them")
        for point in combinations:
            mark = "".join(f" {field}={_shown(at)}" for field, at in point.items())
            found.append((f"{line}{mark}", str(line), {**own, **point}))
    return found


def _check_unlike(cells: Sequence[Cell]) -> None:
    """Two cells of one recipe would be one cell under two names."""
    known: dict[tuple[str, Recipe], Cell] = {}
    for cell in cells:
        other = known.setdefault((cell.task, cell.recipe), cell)
        if other is not cell:
            both = f"{other.variant} and {cell.variant}"
            raise PlanInvalid(f"variants: {both} have the same recipe for {cell.task}; take one of them out")


def _recipe(value: Mapping[str, Any], overrides: Mapping[str, Any], seed: int, where: str) -> Recipe:
    if isinstance(overrides.get("targets"), list):
        overrides = {**overrides, "targets": tuple(overrides["targets"])}
    try:
        named = named_recipe(str(value.get("recipe", "recommended")))
        if overrides.get("method") == "full":  # as `hub train --method full`
            named = named.for_every_weight()
        return named.but(**overrides, seed=seed)
    except (RecipeInvalid, UnknownRecipe, TypeError) as error:
        raise PlanInvalid(f"{where}: {error}") from error


def _overrides(value: Any, where: str) -> dict[str, Any]:
    value = mapping(value if value is not None else {}, where)
    for field in value:
        if field not in _FIELDS:
            raise PlanInvalid(f"{where}: {field!r} is no field of a recipe; they are: {', '.join(sorted(_FIELDS))}")
    return dict(value)


def data_size(chosen: Mapping[str, Any], task: str, size: str) -> DataSize:
    """How many examples of a task the size `chosen` takes; raises `PlanInvalid`, as all below."""
    given = mapping(mapping(chosen.get("data"), f"sizes: {size}: data").get(task), f"sizes: {size}: data: {task}")
    counts = [given.get("train"), given.get("eval")]
    if given.keys() != {"train", "eval"} or not all(type(count) is int and count > 0 for count in counts):
        raise PlanInvalid(f"sizes: {size}: data: {task} needs train and eval, numbers of examples")
    return DataSize(given["train"], given["eval"])


def seeds_of(value: Any, size: str) -> Sequence[int]:
    """The seeds of a size."""
    if not isinstance(value, list) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
        raise PlanInvalid(f"sizes: {size}: seeds needs a list of numbers from 0 up")
    if len(set(value)) < len(value):
        raise PlanInvalid(f"sizes: {size}: seeds has a number twice")
    return value


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """The value as a mapping."""
    if not isinstance(value, dict):
        raise PlanInvalid(f"{where} is no mapping")
    return value


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "+".join(value) if isinstance(value, list) else str(value)
