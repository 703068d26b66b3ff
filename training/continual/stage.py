"""A lesson through the real trainer: `training.finetune` with factors to begin with and rules to keep.

The one place where continual training touches `training.finetune`. What it needs of it is its `Plan`, its `train`, and
the model between being made and being trained, which it reaches by standing in for `finetune.make_trainable`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hub.base import BaseIdentity
from hub.facts import FACTS_FILE, Facts
from training import finetune
from training.base_weights import matrices
from training.checkpoints import Checkpoints
from training.continual.contract import Lesson
from training.continual.errors import FactorsUnsupported
from training.continual.factors import Pair, read_factors
from training.continual.plan import at_rank
from training.continual.rules import SiteRule, govern, held
from training.data import Example
from training.recipe import Recipe
from training.trainable import Method

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Trained:
    """What a lesson came to."""

    factors: dict[str, Pair]  # the rules kept
    facts: Facts  # of the run


@dataclass(frozen=True)
class StageTrainer:
    """Trains lessons on one base; the recipe's rank is that of a fresh adapter."""

    base: BaseIdentity
    base_directory: Path
    method: Method
    recipe: Recipe
    threads: int = 0
    max_steps: int | None = None
    checkpoint_steps: int = 50

    def fit(self, lesson: Lesson[Example], directory: Path, console: Console) -> Trained:
        """Train `lesson` into `directory`/trained, going on from checkpoints there; done already, it is read.

        Raises what `finetune.train` raises, and `FactorsUnsupported` where `start` does not fit the recipe's modules.
        """
        directory.mkdir(parents=True, exist_ok=True)
        out, data = directory / "trained", directory / "lesson.jsonl"
        for partial in directory.glob(".trained.*"):  # of a process that died while writing
            shutil.rmtree(partial, ignore_errors=True)
        rules: dict[str, SiteRule] = {}
        if not out.is_dir():
            replace_file(data, "".join(one.as_line() + "\n" for one in lesson.examples).encode())
            plan = finetune.Plan(
                data=data,
                base=self.base,
                base_directory=self.base_directory,
                recipe=self._recipe(lesson),
                out=out,
                method=self.method,
                max_steps=self.max_steps,
                resume=Checkpoints.beside(out, {}).latest() is not None,
                threads=self.threads,
                checkpoint_steps=self.checkpoint_steps,
            )
            with _on_the_model(lambda model: self._prepare(model, lesson, rules)):
                finetune.train(plan, console)
        Checkpoints.beside(out, {}).discard()  # left where a process died between writing and tidying up
        trained = read_factors(out)
        start = lesson.start or {}
        return Trained(
            {
                module: held(pair, start.get(module), rules.get(module) or self._rule(lesson, module))
                for module, pair in trained.items()
            },
            Facts.parse((out / FACTS_FILE).read_bytes()),
        )

    def _recipe(self, lesson: Lesson[Example]) -> Recipe:
        passes = self.recipe.epochs * lesson.passes
        if lesson.start is None:
            return self.recipe.but(epochs=passes)
        ranks = {pair.rank for pair in lesson.start.values()}
        if len(ranks) != 1:
            raise FactorsUnsupported(f"training goes on from one rank, not from {sorted(ranks)}")
        rank = ranks.pop() + (self.recipe.rank if lesson.grow else 0)
        # Weight decay is no gradient, so nothing would hold it off rows that are to stay.
        decay = 0.0 if any(rule.frozen or rule.still for rule in lesson.rules.values()) else None
        return at_rank(self.recipe, rank, weight_decay=decay, epochs=passes)

    def _prepare(self, model: Any, lesson: Lesson[Example], rules: dict[str, SiteRule]) -> None:
        layers = {
            name.removeprefix(_PEFT_PREFIX): module
            for name, module in model.named_modules()
            if hasattr(module, "lora_A") and "default" in module.lora_A
        }
        if lesson.start is not None and layers.keys() != lesson.start.keys():
            apart = sorted(layers.keys() ^ lesson.start.keys())
            raise FactorsUnsupported(f"the recipe's modules are not the earlier adapter's: {', '.join(apart[:3])}")
        for module, layer in layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            begin: Callable[[], None] | None = None
            if lesson.start is not None:
                begin = _beginning(a, b, lesson.start[module], layer.scaling["default"])
                begin()
            rules[module] = self._rule(lesson, module)
            settle = govern(a, b, rules[module], self.recipe.accumulation)
            layer.register_forward_pre_hook(_before_each_forward(settle, begin))

    def _rule(self, lesson: Lesson[Example], module: str) -> SiteRule:
        if module in lesson.rules:
            return lesson.rules[module]
        if lesson.rule is None:
            return SiteRule()
        [(_, weight)] = matrices(self.base_directory, [module])
        return lesson.rule(module, weight) or SiteRule()


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that whoever looks, and whatever dies, finds the old bytes or the new ones."""
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _beginning(a: Any, b: Any, start: Pair, scale: float) -> Callable[[], None]:
    """Puts `start` into the first rows; called again, only where they are `start` rounded to bfloat16.

    The trainer casts adapters on a quantized base to bfloat16 and we cast them back; nothing may be lost by that.
    """
    first, columns, rank = start.a, start.b / scale, start.rank
    done = False

    def begin() -> None:
        nonlocal done
        with torch.no_grad():
            for values, wanted in ((a.data[:rank], first), (b.data[:, :rank], columns)):
                if not done or torch.equal(values.float().cpu(), wanted.bfloat16().float()):
                    values.copy_(wanted)
        done = True

    return begin


def _before_each_forward(settle: Callable[[], None], begin: Callable[[], None] | None) -> Callable[..., None]:
    waiting = [begin] if begin is not None else []

    def hook(*_: Any) -> None:
        if waiting:
            waiting.pop()()
        settle()

    return hook


@contextmanager
def _on_the_model(look: Callable[[Any], None]) -> Iterator[None]:
    """While this is open, every model that `finetune` makes goes through `look` before it is trained."""
    module: Any = finetune
    original = module.make_trainable

    def made(*args: Any, **options: Any) -> Any:
        trainable = original(*args, **options)
        look(trainable.model)
        return trainable

    module.make_trainable = made
    try:
        yield
    finally:
        module.make_trainable = original
