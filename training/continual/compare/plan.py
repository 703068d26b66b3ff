"""A comparison's plan, from YAML to runs.

title: …                        what the page is called
question: …                     what it is to answer
plan: six-tasks.yaml            a continual plan beside this file; strategy, seed and numbers of examples come from here
arms:                           by name, the most telling first
  joint: {strategy: joint}
  isolated: {strategy: isolated}
  replay-5: {strategy: {name: replay, share: 0.05}}
  replay-5-reduced: {strategy: {name: replay, share: 0.05}, reduce_intruders: 0.25}
  joint-2: {strategy: joint, set: {epochs: 2}}                    over the plan's own `set`
orders: {as-told: [sentiment, iam-policy, …], reversed: […]}      labels of all the plan's tasks
sizes:
  small: {seeds: [0], data: {sentiment: {train: 120, eval: 40}, …}}     tasks with files of their own need no numbers
shown: [replay-5]               optional: arms whose matrices are shown; else sequential and the best

Each arm, order and seed is one run. What `joint` and `isolated` learn does not depend on the order, so they run once a
seed, in the order of the plan: every adapter of `isolated` is trained with the plan's seed from nothing whatever its
stage, and scored on its own task; its router sees the same prompts. `joint` sees the same examples, shuffled by the
same seed from another order, which is the same in distribution, not in bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from training.cells import key_of, made_of_recipe
from training.continual.errors import ContinualPlanInvalid
from training.continual.plan import ContinualPlan
from training.errors import PlanInvalid
from training.sweep.plan import data_size, mapping, seeds_of

ANY_ORDER: Final = "any"
_FORMAT: Final = 1
_ORDERLESS: Final = ("joint", "isolated")
_KEYS = ("title", "question", "plan", "arms", "orders", "sizes", "shown")
_ARM_KEYS = ("strategy", "reduce_intruders", "keep_text", "set")
_NOT_MADE_OF = ("name", "checkpoint_steps", "text", "keep_text")  # files are in the key by their digests


@dataclass(frozen=True, eq=False)
class Case:
    """One run."""

    arm: str
    order: str  # ANY_ORDER where it makes no difference
    plan: ContinualPlan

    @property
    def seed(self) -> int:
        """The run's."""
        return self.plan.recipe.seed

    @property
    def text(self) -> str:
        """As people read it."""
        return f"{self.arm} · order {self.order} · seed {self.seed}"

    def key(self, base: str, data: Mapping[str, str], text: str | None, keep_text: str | None = None) -> str:
        """The name of its cell: equal for what would give equal results.

        `base` is the base's fingerprint, `data` the digests of the tasks' files, `text` and `keep_text` of those texts.
        """
        told = {name: value for name, value in self.plan.as_dict().items() if name not in _NOT_MADE_OF}
        told["recipe"] = made_of_recipe(told["recipe"])
        told["tasks"] = [
            [one.label, one.task, data[f"{one.label}/train"], data[f"{one.label}/eval"]] for one in self.plan.tasks
        ]
        told["gates"] = {name: value for name, value in told["gates"].items() if name != "alias"}
        return key_of([_FORMAT, told, base, text, *([keep_text] if keep_text is not None else [])])


@dataclass(frozen=True)
class Comparison:
    """A plan at one of its sizes."""

    name: str  # the file's, without its suffix
    title: str
    question: str
    size: str
    arms: tuple[str, ...]
    orders: Mapping[str, tuple[str, ...]]
    shown: tuple[str, ...] | None
    cases: tuple[Case, ...]  # by seed, then order, then arm: what is cut short has whole comparisons

    @property
    def base(self) -> str:
        """Every run's."""
        return self.cases[0].plan.base

    def plan_of(self, arm: str) -> ContinualPlan:
        """One of the arm's plans."""
        return next(case.plan for case in self.cases if case.arm == arm)

    def bound(self, strategy: str) -> str | None:
        """The first arm with a strategy and nothing taken out: `joint` and `isolated` are the bounds of others."""
        plain = (arm for arm in self.arms if self.plan_of(arm).reduce_intruders is None)
        return next((arm for arm in plain if self.plan_of(arm).strategy == strategy), None)

    @classmethod
    def read(cls, path: Path, size: str) -> Self:
        """The comparison in a file; raises `PlanInvalid` and `ContinualPlanInvalid`, naming the place."""
        value = mapping(_yaml(path), "the comparison")
        if strange := [key for key in value if key not in _KEYS]:
            raise PlanInvalid(f"the comparison has the unknown key {strange[0]!r}; known: {', '.join(_KEYS)}")
        if not isinstance(value.get("plan"), str):
            raise PlanInvalid("plan is the name of a continual plan's file")
        base = path.parent / value["plan"]
        return cls.parse(value, path.stem, size, _yaml(base), base.parent)

    @classmethod
    def parse(cls, value: Mapping[str, Any], name: str, size: str, base: Any, directory: Path) -> Self:
        """The comparison in what YAML gave, over the continual plan `base`; `directory` is where that lies."""
        base = mapping(base, "the continual plan")
        sizes = mapping(value.get("sizes"), "sizes")
        if size not in sizes:
            raise PlanInvalid(f"the comparison has no size {size!r}; it has: {', '.join(map(str, sizes))}")
        chosen = mapping(sizes[size], f"sizes: {size}")
        tasks = _sized(base.get("tasks"), chosen, size)
        arms, orders = _arms(value.get("arms")), _orders(value.get("orders"), tasks)
        cases: list[Case] = []
        for seed in seeds_of(chosen.get("seeds"), size):
            for number, (order, labels) in enumerate(orders.items()):
                for arm, given in arms.items():
                    orderless = _strategy(given) in _ORDERLESS
                    settings = {
                        **mapping(base.get("set", {}), "set"),
                        **mapping(given.get("set", {}), f"arms: {arm}: set"),
                    }
                    if orderless and number:
                        continue
                    stages = [tasks[label] for label in (tasks if orderless else labels)]
                    try:
                        told = {**base, **given, "set": settings, "seed": seed, "tasks": stages}
                        plan = ContinualPlan.parse(told, directory)
                    except ContinualPlanInvalid as error:
                        raise ContinualPlanInvalid(f"arms: {arm}: {error}") from error
                    cases.append(Case(arm, ANY_ORDER if orderless else order, plan))
        shown = value.get("shown")
        if shown is not None and (not isinstance(shown, list) or any(arm not in arms for arm in shown)):
            raise PlanInvalid(f"shown is a list of arms, of: {', '.join(arms)}")
        return cls(
            name, str(value.get("title", name)), str(value.get("question", "")), size, tuple(arms), orders,
            tuple(shown) if shown is not None else None, tuple(cases),
        )  # fmt: skip


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PlanInvalid(f"{path.name} is no YAML that can be read: {error}") from error


def _sized(tasks: Any, chosen: Mapping[str, Any], size: str) -> dict[str, dict[str, Any]]:
    """The plan's tasks by label, with this size's numbers of examples."""
    if not isinstance(tasks, list) or not tasks:
        raise PlanInvalid("the continual plan needs a list of tasks")
    found = {}
    for one in tasks:
        told = dict(mapping({"task": one} if isinstance(one, str) else one, "the continual plan: tasks"))
        label = str(told.get("label", told.get("task")))
        if "train_file" not in told:
            data = data_size(chosen, label, size)
            told |= {"train": data.train, "eval": data.evaluation}
        found[label] = told
    return found


def _strategy(given: Mapping[str, Any]) -> Any:
    """The name of an arm's strategy, as far as it has one."""
    told = given.get("strategy")
    return told.get("name") if isinstance(told, dict) else told


def _arms(value: Any) -> dict[str, dict[str, Any]]:
    arms = {str(arm): dict(mapping(given, f"arms: {arm}")) for arm, given in mapping(value, "arms").items()}
    for arm, given in arms.items():
        if strange := [key for key in given if key not in _ARM_KEYS]:
            raise PlanInvalid(f"arms: {arm} has the unknown key {strange[0]!r}; known: {', '.join(_ARM_KEYS)}")
    if not arms:
        raise PlanInvalid("arms: name at least one")
    return arms


def _orders(value: Any, tasks: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    orders = mapping(value if value is not None else {"as-told": list(tasks)}, "orders")
    for order, labels in orders.items():
        if not isinstance(labels, list) or sorted(map(str, labels)) != sorted(tasks):
            raise PlanInvalid(f"orders: {order} has each of the plan's tasks once: {', '.join(tasks)}")
    if not orders:
        raise PlanInvalid("orders: name at least one")
    return {str(order): tuple(labels) for order, labels in orders.items()}
