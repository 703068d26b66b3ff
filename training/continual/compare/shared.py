"""What several runs of a comparison have in common, done once: adapters trained from nothing, the base's answers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor

from training import output
from training.cells import key_of, made_of_recipe, read_json, write_json
from training.continual.contract import Lesson
from training.continual.scoring import Cell, EngineScorer, Scorer
from training.continual.stage import StageTrainer, Trained
from training.data import Example, digest_of


@dataclass(frozen=True)
class SharingTrainer(StageTrainer):
    """Trains a lesson from nothing once, whichever run comes to it first; others get a copy.

    That is every lesson without rules and with the recipe's passes: all of `isolated` and `merge`, and the first of
    most strategies. The copy says what its training took, as if it had been made again.
    """

    shared: Path = Path()

    def fit(self, lesson: Lesson[Example], directory: Path, console: Console) -> Trained:
        """See `StageTrainer.fit`."""
        if lesson.start is not None or lesson.rules or lesson.rule is not None or lesson.passes != 1:
            return super().fit(lesson, directory, console)
        kept, trained = self.shared / self._key(lesson), directory / "trained"
        if kept.is_dir() and not trained.is_dir():
            console.print("trained already, in another run", highlight=False)
            output.write_directory(trained, lambda place: _copy(kept, place))
        done = super().fit(lesson, directory, console)
        if not kept.is_dir():
            output.write_directory(kept, lambda place: _copy(trained, place))
        return done

    def _key(self, lesson: Lesson[Example]) -> str:
        examples = digest_of("".join(one.as_line() + "\n" for one in lesson.examples).encode())
        recipe = made_of_recipe(self.recipe.as_dict())
        return key_of([self.base.fingerprint, self.method, recipe, self.max_steps, examples])


@dataclass(frozen=True)
class SharingScorer:
    """Asks the base by itself, and once; of another engine's batch its scores may differ in a rounding."""

    inner: EngineScorer
    base: str  # its fingerprint
    shared: Path

    def check(self, first: int) -> None:
        """See `training.continual.scoring.Scorer`."""
        self.inner.check(first)

    def scores(self, cells: Sequence[Cell]) -> list[dict[str, float]]:
        """See `training.continual.scoring.Scorer`."""
        places = {exam: self._exam(exam) for exam, adapter in cells if adapter is None}
        unknown = [exam for exam, place in places.items() if read_json(place) is None]
        if unknown:
            for exam, found in zip(unknown, self.inner.scores([(exam, None) for exam in unknown]), strict=True):
                write_json(places[exam], {"metrics": list(found.items())})
        asked = [cell for cell in cells if cell[1] is not None]
        own = iter(self.inner.scores(asked) if asked else [])
        known = {exam: dict((read_json(place) or {})["metrics"]) for exam, place in places.items()}
        return [known[exam] if adapter is None else next(own) for exam, adapter in cells]

    def answers(self, adapter: Path, examples: Sequence[Example]) -> list[Example]:
        """See `training.continual.scoring.Scorer`."""
        return self.inner.answers(adapter, examples)

    def losses(self, adapters: Sequence[Path], examples: Sequence[Example]) -> list[list[float]]:
        """See `training.continual.scoring.Scorer`."""
        return self.inner.losses(adapters, examples)

    def inputs(self, adapter: Path, groups: Sequence[tuple[float, Sequence[Example] | None]]) -> dict[str, Tensor]:
        """See `training.continual.scoring.Scorer`."""
        return self.inner.inputs(adapter, groups)

    def routed(self, choices: Sequence[Sequence[Path | None]]) -> list[dict[str, float]]:
        """See `training.continual.scoring.Scorer`."""
        return self.inner.routed(choices)

    def text_nats(self, adapters: Sequence[Path | None]) -> list[float]:
        """See `training.continual.scoring.Scorer`."""
        place = self.shared / f"text-{key_of([self.base, self.inner.text, self.inner.text_windows])}.json"
        told = read_json(place)
        if told is None and None in adapters:
            told = {"nats": self.inner.text_nats([None])[0]}
            write_json(place, told)
        asked = [one for one in adapters if one is not None]
        own = iter(self.inner.text_nats(asked) if asked else [])
        return [next(own) if one is not None else float((told or {})["nats"]) for one in adapters]

    def _exam(self, exam: int) -> Path:
        asked = self.inner.exams[exam]
        lines = "".join(one.as_line() + "\n" for one in asked.examples)
        key = key_of([self.base, self.inner.quantize, asked.task.name, digest_of(lines.encode())])
        return self.shared / f"base-{key}.json"


def sharing(trainer: StageTrainer, scorer: Scorer, shared: Path) -> tuple[StageTrainer, Scorer]:
    """The same, keeping what several runs have in common in the directory `shared`."""
    if isinstance(trainer, StageTrainer):
        trainer = SharingTrainer(**vars(trainer), shared=shared / "lessons")
    if isinstance(scorer, EngineScorer):
        scorer = SharingScorer(scorer, trainer.base.fingerprint or "", shared / "base")
    return trainer, scorer


def _copy(source: Path, target: Path) -> None:
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copy2(file, target / file.name)
