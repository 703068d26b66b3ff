"""A continual plan, from YAML to values.

name: team/six                    the adapter's name in the hub; `isolated` makes team/six-<task>, one a task
base: smollm2-135m
method: lora                      or qlora
recipe: demo                      a named recipe (`hub recipes`)
set: {epochs: 1, rank: 8}         fields of the recipe, for every stage
seed: 0
strategy: replay                  or {name: replay, share: 0.05, capacity: 500}
reduce_intruders: 0.25            optional: this share of every intruder dimension is taken out after each stage
tasks:                            in the order of training
  - {task: sentiment, train: 400, eval: 200}                             built from installed packages
  - {task: iam-policy, train_file: mine.jsonl, eval_file: held.jsonl}    or your own; paths beside the plan
gates: {max_drop: 0.02, max_text_drift: 0.02, alias: prod, after_refusal: go-on}
text: README.md                   optional: held-out text, for its cross-entropy
keep_text: prose.txt              optional: other text on which `aimed` keeps the base as it is
quantize: none                    how the engine holds the base for scores and router: none, int8, nf4 (so with qlora)
intruders: true                   count intruder dimensions of every stage at the end; last: of the last stage
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self, get_args

from hub.errors import HubError
from hub.refs import AdapterRef, Alias
from server.config import Quantization
from training.continual.errors import ContinualPlanInvalid
from training.continual.gates import Gates
from training.data import digest_of
from training.errors import RecipeInvalid, UnknownRecipe, UnknownTask
from training.presets import named_recipe
from training.recipe import Recipe
from training.tasks import task_named

_KEYS = (
    "name", "base", "method", "recipe", "set", "seed", "strategy", "reduce_intruders", "tasks", "gates", "text",
    "text_windows", "keep_text", "quantize", "intruders", "max_steps", "checkpoint_steps",
)  # fmt: skip
_TASK_KEYS = ("task", "label", "train", "eval", "train_file", "eval_file")
_GATE_KEYS = ("max_drop", "max_text_drift", "alias", "after_refusal")
_RECIPE_FIELDS = {field.name for field in fields(Recipe)} - {"name", "source", "when", "seed", "method"}


@dataclass(frozen=True)
class TaskPlan:
    """One task of the stream."""

    label: str  # unlike every other's
    task: str  # whose scores are used
    train: int = 400  # examples, where they are built
    evaluation: int = 200
    train_file: str | None = None  # or where they lie
    eval_file: str | None = None


@dataclass(frozen=True)
class ContinualPlan:
    """Everything a run is told."""

    name: str
    base: str
    method: Literal["lora", "qlora"]
    recipe: Recipe
    strategy: str
    options: Mapping[str, Any]  # of the strategy
    reduce_intruders: float | None
    tasks: tuple[TaskPlan, ...]
    gates: Gates
    directory: Path  # where the plan lies; paths in it start there
    text: str | None = None
    text_windows: int = 64
    keep_text: str | None = None
    quantize: Quantization = "none"
    intruders: bool | Literal["last"] = True
    max_steps: int | None = None  # a stage's, for trying out
    checkpoint_steps: int = 50

    @property
    def labels(self) -> tuple[str, ...]:
        """The tasks' labels, in order."""
        return tuple(task.label for task in self.tasks)

    def adapter_name(self, label: str) -> str:
        """What the hub calls the adapter of a task's stage: each its own with `isolated`, else one for all."""
        return f"{self.name}-{label}" if self.strategy == "isolated" else self.name

    @property
    def served_rank(self) -> int:
        """The largest rank that a stage serves."""
        from training.continual.registry import strategy_named  # brings torch

        strategy = strategy_named(self.strategy, self.options, self.reduce_intruders)
        return strategy.served_rank(self.recipe.rank, len(self.tasks))

    @property
    def digest(self) -> str:
        """Of what the plan says, not of how its file is laid out."""
        return digest_of(json.dumps(self.as_dict(), sort_keys=True).encode())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "name": self.name,
            "base": self.base,
            "method": self.method,
            "recipe": self.recipe.as_dict(),
            "strategy": {"name": self.strategy, **self.options},
            "reduce_intruders": self.reduce_intruders,
            "tasks": [vars(task) for task in self.tasks],
            "gates": vars(self.gates),
            "text": self.text,
            "text_windows": self.text_windows,
            "quantize": self.quantize,
            "intruders": self.intruders,
            "max_steps": self.max_steps,
            "checkpoint_steps": self.checkpoint_steps,
            **({"keep_text": self.keep_text} if self.keep_text is not None else {}),
        }

    @classmethod
    def read(cls, path: Path) -> Self:
        """The plan in a file; raises `ContinualPlanInvalid`, naming the place."""
        import yaml

        try:
            value = yaml.safe_load(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ContinualPlanInvalid(f"{path.name} is no YAML that can be read: {error}") from error
        return cls.parse(value, path.parent)

    @classmethod
    def parse(cls, value: Any, directory: Path) -> Self:
        """The plan in what YAML gave; raises `ContinualPlanInvalid`."""
        value = _mapping(value, "the plan", _KEYS)
        strategy = value.get("strategy")
        if strategy is None:
            raise ContinualPlanInvalid("strategy is missing: name one, such as replay")
        given = {"name": strategy} if isinstance(strategy, str) else dict(_mapping(strategy, "strategy", None))
        plan = cls(
            name=_adapter_name(value.get("name")),
            base=_text(value, "base", "smollm2-135m"),
            method=_one_of(value, "method", ("lora", "qlora"), "lora"),
            recipe=_recipe(value),
            strategy=str(given.pop("name", "")),
            options=given,
            reduce_intruders=_number(value, "reduce_intruders", 0, 1, None),
            tasks=_tasks(value.get("tasks")),
            gates=_gates(value.get("gates", {})),
            directory=directory,
            text=_file(value, "text"),
            text_windows=_count(value, "text_windows", 64),
            keep_text=_file(value, "keep_text"),
            quantize=_one_of(
                value, "quantize", get_args(Quantization), "nf4" if value.get("method") == "qlora" else "none"
            ),
            intruders="last" if value.get("intruders") == "last" else _flag(value, "intruders", True),
            max_steps=_count(value, "max_steps", None),
            checkpoint_steps=_given(value, "checkpoint_steps", 50),
        )
        if plan.gates.max_text_drift is not None and plan.text is None:
            raise ContinualPlanInvalid("gates: max_text_drift needs a text")
        if plan.keep_text is not None and plan.strategy != "aimed":
            raise ContinualPlanInvalid(f"keep_text is read by the strategy aimed alone, not by {plan.strategy}")
        if getattr(plan.recipe, "variant", "plain") != "plain":
            raise ContinualPlanInvalid("set: variant: continual strategies combine plain LoRA only")
        if plan.recipe.init != "random":
            raise ContinualPlanInvalid("set: init: each adapter would hold the base's rounding, and sums of them twice")
        if plan.strategy == "isolated":
            _check_names(plan)
        _check_rank(plan)
        return plan


def at_rank(recipe: Recipe, rank: int, **changes: Any) -> Recipe:
    """The recipe for an adapter of another rank, whose scale stays what it was; raises `RecipeInvalid`."""
    alpha = recipe.alpha * rank / recipe.rank
    return recipe.but(rank=rank, alpha=int(alpha) if alpha.is_integer() else alpha, **changes)


def _check_rank(plan: ContinualPlan) -> None:
    """A strategy whose adapter grows must not outgrow what can be trained; refuses unknown options too."""
    rank = plan.served_rank
    try:
        if plan.strategy == "merge":  # which never trains at the rank that it serves
            plan.recipe.but(rank=rank)
        else:
            at_rank(plan.recipe, rank)
    except RecipeInvalid as error:
        raise ContinualPlanInvalid(
            f"strategy {plan.strategy}: {len(plan.tasks)} tasks at rank {plan.recipe.rank} make an adapter of rank "
            f"{rank}, and {error}; lower set: rank"
        ) from error


def _check_names(plan: ContinualPlan) -> None:
    for label in plan.labels:
        try:
            AdapterRef.parse(plan.adapter_name(label))
        except HubError as error:
            raise ContinualPlanInvalid(f"tasks: the label {label!r} makes no adapter's name: {error}") from error


def _recipe(value: Mapping[str, Any]) -> Recipe:
    overrides = _mapping(value.get("set", {}), "set", tuple(sorted(_RECIPE_FIELDS)))
    if isinstance(overrides.get("targets"), list):
        overrides = {**overrides, "targets": tuple(overrides["targets"])}
    try:
        named = named_recipe(_text(value, "recipe", "recommended"))
        method = _one_of(value, "method", ("lora", "qlora"), "lora")
        return named.but(method=method, seed=_count(value, "seed", 0, least=0), **overrides)
    except (UnknownRecipe, RecipeInvalid, TypeError) as error:
        raise ContinualPlanInvalid(f"recipe: {error}") from error


def _tasks(value: Any) -> tuple[TaskPlan, ...]:
    if not isinstance(value, list) or not value:
        raise ContinualPlanInvalid("tasks is a list of at least one task")
    tasks = []
    for number, one in enumerate(value, 1):
        where = f"tasks, number {number}"
        one = _mapping({"task": one} if isinstance(one, str) else one, where, _TASK_KEYS)
        if one.get("task") is None:
            raise ContinualPlanInvalid(f"{where}: say which task it is, such as task: sentiment")
        try:
            task = task_named(str(one["task"])).name
        except UnknownTask as error:
            raise ContinualPlanInvalid(f"{where}: {error}") from error
        files = one.get("train_file"), one.get("eval_file")
        if (files[0] is None) != (files[1] is None) or any(not isinstance(f, str) for f in files if f is not None):
            raise ContinualPlanInvalid(f"{where}: give both train_file and eval_file, or neither")
        label = one.get("label", task)
        if not isinstance(label, str) or not label.replace("-", "").isalnum() or label != label.lower():
            raise ContinualPlanInvalid(f"{where}: a label is lower-case letters, digits and dashes, not {label!r}")
        count = _given if files[0] is None else _count  # numbers that nothing is built by may be null
        tasks.append(TaskPlan(label, task, count(one, "train", 400), count(one, "eval", 200), *files))
    labels = [task.label for task in tasks]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ContinualPlanInvalid(f"tasks: {twice[0]} is there twice; give one of them another label")
    return tuple(tasks)


def _gates(value: Any) -> Gates:
    value = _mapping(value, "gates", _GATE_KEYS)
    plain = Gates()
    max_drop = _number(value, "max_drop", 0, 1, plain.max_drop)
    if max_drop is None:
        raise ContinualPlanInvalid("gates: max_drop is a number from 0 to 1; 1 allows every fall")
    try:
        alias = Alias.parse(_text(value, "alias", plain.alias)).name
    except HubError as error:
        raise ContinualPlanInvalid(f"gates: alias: {error}") from error
    return Gates(
        max_drop=max_drop,
        max_text_drift=_number(value, "max_text_drift", 0, 100, None),
        alias=alias,
        after_refusal=_one_of(value, "after_refusal", ("go-on", "stop"), plain.after_refusal),
    )


def _adapter_name(value: Any) -> str:
    try:
        ref = AdapterRef.parse(value if isinstance(value, str) else "")
    except HubError as error:
        raise ContinualPlanInvalid(f"name: {error}") from error
    if ref.full_name != value:
        raise ContinualPlanInvalid(f"name: {value} names a version; give the adapter's name alone")
    return ref.full_name


def _mapping(value: Any, where: str, known: tuple[str, ...] | None) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ContinualPlanInvalid(f"{where} is no mapping")
    if known is not None and (strange := [key for key in value if key not in known]):
        raise ContinualPlanInvalid(f"{where} has the unknown key {strange[0]!r}; known: {', '.join(known)}")
    return value


def _text(value: Mapping[str, Any], key: str, default: str) -> str:
    found = value.get(key, default)
    if not isinstance(found, str):
        raise ContinualPlanInvalid(f"{key} is a text, not {found!r}")
    return found


def _file(value: Mapping[str, Any], key: str) -> str | None:
    found = value.get(key)
    if found is not None and (not isinstance(found, str) or not found):
        raise ContinualPlanInvalid(f"{key} is the name of a file, not {found!r}; leave it out where there is none")
    return found


def _one_of(value: Mapping[str, Any], key: str, known: tuple[str, ...], default: str) -> Any:
    found = value.get(key, default)
    if found not in known:
        raise ContinualPlanInvalid(f"{key} is one of {', '.join(known)}, not {found!r}")
    return found


def _flag(value: Mapping[str, Any], key: str, default: bool) -> bool:
    found = value.get(key, default)
    if not isinstance(found, bool):
        raise ContinualPlanInvalid(f"{key} is true, false or last, not {found!r}")
    return found


def _count(value: Mapping[str, Any], key: str, default: int | None, least: int = 1) -> Any:
    found = value.get(key, default)
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or found < least):
        raise ContinualPlanInvalid(f"{key} is a whole number from {least} up, not {found!r}")
    return found


def _given(value: Mapping[str, Any], key: str, default: int) -> int:
    if _count(value, key, default) is None:
        raise ContinualPlanInvalid(f"{key} is a whole number from 1 up; leave it out for {default}")
    return int(value.get(key, default))


def _number(value: Mapping[str, Any], key: str, low: float, high: float, default: float | None) -> float | None:
    found = value.get(key, default)
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not low <= found <= high:
        raise ContinualPlanInvalid(f"{key} is a number from {low:g} to {high:g}, not {found!r}")
    return float(found)
