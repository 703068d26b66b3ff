"""A plan, stage after stage. What is finished is on disk, so the same command goes on wherever a run was stopped.

DIR/state.json            what is done (`RunRecord`), replaced whole after every stage
DIR/answer_nats.json      the tasks' own answers by each stage's and by the last adapter, measured at the end
DIR/data/<label>/         the tasks' files, where they are built
DIR/stages/<n>-<label>/   one stage: answers.jsonl and lesson.jsonl (its data), trained/ (with checkpoints beside while
                          it runs), outcome/ (served/, kept-…/, memory.jsonl, notes.json), scores.json, adapter/ (as
                          it is pushed); again-1/… like the stage itself where a strategy trains further lessons

Each of these is written beside its place and renamed, in this order; a stage begins again at the first that is missing.
Pushing what the hub has already makes no second version, and an alias that already names it has been moved by us.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from hub.facade import HubFacade
from hub.facts import FACTS_FILE, Facts
from training import output
from training.base_weights import matrices
from training.continual.beginning import begin
from training.continual.contract import Lesson, Outcome, Past, Strategy
from training.continual.embedding import Embed
from training.continual.ending import conclude
from training.continual.factors import Factors, read_factors, write_factors
from training.continual.gates import judge
from training.continual.inputs import readable
from training.continual.plan import ContinualPlan
from training.continual.promotion import last_number, promote
from training.continual.record import RunRecord, StageRecord
from training.continual.registry import strategy_named
from training.continual.scoring import Scorer, headline
from training.continual.stage import StageTrainer, replace_file
from training.continual.tasks import TaskData
from training.data import Example, digest_of, read_jsonl, write_jsonl


@dataclass(frozen=True)
class Run:
    """A plan with everything it needs to be run."""

    plan: ContinualPlan
    directory: Path
    data: tuple[TaskData, ...]
    trainer: StageTrainer
    scorer: Scorer
    hub: HubFacade
    console: Console
    embed: Embed | None = None  # None: no router is fitted

    def __call__(self) -> RunRecord:
        """Run what is left of the plan; returns the whole record. Where tasks were appended to the plan, they follow.

        Raises what `beginning.begin` raises before anything is trained, and what training, scoring and the hub raise;
        then the same call goes on later.
        """
        strategy = strategy_named(self.plan.strategy, self.plan.options, self.plan.reduce_intruders)
        record = begin(self, strategy)
        for index in range(len(record.stages), len(self.plan.tasks)):
            if record.stopped:
                said = f"{record.stages[-1].version} was refused, and the plan ends there (gates: after_refusal: stop)"
                self.console.print(said, highlight=False)
                break
            record = _Stage(self, strategy, record, index).run()
            record.write(self.directory)
        conclude(self, record, strategy.evolving)
        return record

    def stage_directory(self, index: int) -> Path:
        """Where stage `index` (from 0) lies."""
        return self.directory / "stages" / f"{index + 1}-{self.plan.labels[index]}"


@dataclass(frozen=True)
class _Stage:
    """One stage of a run."""

    run_: Run
    strategy: Strategy
    record: RunRecord
    index: int

    @property
    def directory(self) -> Path:
        return self.run_.stage_directory(self.index)

    @property
    def label(self) -> str:
        return self.run_.plan.labels[self.index]

    def run(self) -> RunRecord:
        """Do what is left of it; the record with it at the end."""
        for partial in self.directory.glob(".*"):  # of a process that died while writing
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        self.directory.mkdir(parents=True, exist_ok=True)
        total = len(self.run_.plan.tasks)
        self.run_.console.print(
            f"stage {self.index + 1} of {total}: {self.label}, {self.strategy.name}", highlight=False
        )
        if not (self.directory / "outcome").is_dir():
            self._learn()
        outcome = self.outcome(self.index)
        scores = self._scores()
        self._adapter(outcome, scores)
        return self._publish(outcome, scores)

    def _learn(self) -> None:
        further: list[Facts] = []

        def train(lesson: Lesson[Example]) -> Factors:
            place = self.directory / f"again-{len(further) + 1}"
            done = self.run_.trainer.fit(lesson, place, self.run_.console)
            further.append(done.facts)
            return done.factors

        past = self._past(train)
        lesson = self.strategy.lesson(past)
        trained = self.run_.trainer.fit(lesson, self.directory, self.run_.console)
        outcome = self.strategy.finish(past, trained.factors)
        outcome = replace(outcome, notes={**lesson.notes, **outcome.notes})
        facts = _with_times_of(trained.facts, further)
        output.write_directory(self.directory / "outcome", lambda place: self._save(place, outcome, facts))

    def _past(self, train: Callable[[Lesson[Example]], Factors]) -> Past[Example]:
        data, base = self.run_.data, self.run_.trainer.base_directory
        return Past(
            stage=self.index,
            examples=data[self.index].train.examples,
            outcomes=tuple(self.outcome(index) for index in range(self.index)),
            earlier=tuple(task.train.examples for task in data[: self.index]),
            answers=lambda _, examples: self._answers(examples),
            readable=lambda examples: readable(base, examples),
            losses=self._losses,
            inputs=self._inputs,
            train=train,
            weights=lambda modules: matrices(base, modules),
            seed=self.run_.plan.recipe.seed,
        )

    def _answers(self, examples: Sequence[Example]) -> Sequence[Example]:
        """The adapter before this stage on `examples`; asked once, whatever happens in between."""
        place = self.directory / "answers.jsonl"
        if not place.is_file():
            before = self.run_.stage_directory(self.index - 1) / "outcome" / "served"
            said = self.run_.scorer.answers(before, examples)
            replace_file(place, "".join(one.as_line() + "\n" for one in said).encode())
        return read_jsonl(place).examples if place.stat().st_size else ()

    def _losses(self, adapters: Sequence[Factors], examples: Sequence[Example]) -> list[list[float]]:
        with self._written(adapters) as directories:
            return self.run_.scorer.losses(directories, examples)

    def _inputs(
        self, factors: Factors, groups: Sequence[tuple[float, Sequence[Example] | None]]
    ) -> Mapping[str, Tensor]:
        with self._written([factors]) as [directory]:
            return self.run_.scorer.inputs(directory, groups)

    @contextmanager
    def _written(self, adapters: Sequence[Factors]) -> Iterator[list[Path]]:
        """Directories with the adapters, for as long as this is open."""
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=".asked-") as place:
            directories = []
            for number, factors in enumerate(adapters):
                directories.append(Path(place, str(number)))
                directories[-1].mkdir()
                write_factors(directories[-1], factors, self.run_.trainer.base.name or "")
            yield directories

    def _save(self, place: Path, outcome: Outcome[Example], facts: Facts) -> None:
        base = self.run_.trainer.base.name or ""
        for name, factors in {"served": outcome.served, **{f"kept-{k}": f for k, f in outcome.kept.items()}}.items():
            (place / name).mkdir()
            write_factors(place / name, factors, base)
        write_jsonl(place / "memory.jsonl", outcome.memory)
        (place / "notes.json").write_text(json.dumps(dict(outcome.notes)), "utf-8")
        facts.write(place)

    def outcome(self, index: int) -> Outcome[Example]:
        """What stage `index` left behind."""
        place = self.run_.stage_directory(index) / "outcome"
        memory = place / "memory.jsonl"
        return Outcome(
            served=read_factors(place / "served"),
            kept={one.name.removeprefix("kept-"): read_factors(one) for one in sorted(place.glob("kept-*"))},
            memory=read_jsonl(memory).examples if memory.stat().st_size else (),
            notes=json.loads((place / "notes.json").read_text("utf-8")),
        )

    def _scores(self) -> dict[str, Any]:
        """{"row", "metrics", "text", and in the first stage "base", "base_text"}: asked once, in one batch."""
        place, count_ = self.directory / "scores.json", len(self.run_.plan.tasks)
        if place.is_file():
            told: dict[str, Any] = json.loads(place.read_text("utf-8"))
            if len(told["row"]) == count_:  # else tasks were appended to the plan since
                return told
        served, first = self.directory / "outcome" / "served", self.index == 0
        exams = range(count_) if self.strategy.evolving else [self.index]
        cells = [*((exam, None) for exam in range(count_) if first), *((exam, served) for exam in exams)]
        found = self.run_.scorer.scores(cells)
        base = [headline(one) for one in found[:count_]] if first else list(self.record.base_row)
        own = found[count_:] if first else found
        if self.strategy.evolving:
            row, metrics = [headline(one) for one in own], own[self.index]
        else:
            # What an earlier task's own adapter does has not changed; what no task has learned yet, the base answers.
            before = self.record.stages[-1].row if self.record.stages else base
            row, metrics = [*before[: self.index], headline(own[0]), *base[self.index + 1 :]], own[0]
        told = {"row": row, "metrics": metrics, "base": base, "text": None, "base_text": self.record.base_text_nats}
        if self.run_.plan.text is not None:
            nats = self.run_.scorer.text_nats([None, served] if first else [served])
            told["text"] = nats[-1]
            told["base_text"] = nats[0] if first else self.record.base_text_nats
        replace_file(place, json.dumps(told).encode())
        return told

    def _adapter(self, outcome: Outcome[Example], scores: dict[str, Any]) -> None:
        """The directory to push: the served factors with the facts of how they came to be."""
        plan, place = self.run_.plan, self.directory / "adapter"
        if place.is_dir():
            return
        trained = Facts.parse((self.directory / "outcome" / FACTS_FILE).read_bytes())
        memory = self.directory / "outcome" / "memory.jsonl"
        datasets = dict(trained.datasets) if isinstance(trained.datasets, dict) else {"files": trained.datasets}
        told = replace(
            trained,
            recipe={
                **trained.recipe,
                "continual": {
                    "strategy": {"name": plan.strategy, **plan.options},
                    "reduce_intruders": plan.reduce_intruders,
                    "stage": self.index + 1,
                    "tasks": list(plan.labels[: self.index + 1]),
                },
            },
            datasets={
                **datasets,
                "memory": {"examples": len(outcome.memory), "digest": digest_of(memory.read_bytes())},
            },
            metrics={
                **trained.metrics,
                **{f"continual_{name}": value for name, value in outcome.notes.items()},
                "scores": dict(zip(plan.labels, scores["row"], strict=True)),
                **({"text_nats_per_token": scores["text"]} if scores["text"] is not None else {}),
            },
        )

        def save(directory: Path) -> None:
            write_factors(directory, outcome.served, self.run_.trainer.base.name or "")
            (directory / "README.md").write_text(output.model_card(self.run_.trainer.base.name or "", told), "utf-8")
            told.write(directory)

        output.write_directory(place, save)

    def _publish(self, outcome: Outcome[Example], scores: dict[str, Any]) -> RunRecord:
        run, plan = self.run_, self.run_.plan
        before = self.record.stages[-1] if self.record.stages else None
        parent = before.version if before is not None and self.strategy.inherits else None
        name = plan.adapter_name(self.label)
        place = self.directory / "adapter"
        version = run.hub.push(place, name, base=plan.base, parents=[parent] if parent else []).version
        rows = [*(stage.row for stage in self.record.stages), tuple(scores["row"])]
        promoted = [index for index, stage in enumerate(self.record.stages) if stage.promoted]
        text = (scores["base_text"], scores["text"]) if scores["text"] is not None else None
        refusals = tuple(fall.text for fall in judge(plan.gates, plan.labels, rows, promoted, text))
        if not refusals:
            refusals = promote(run.hub, name, version.number, plan.gates.alias, last_number(self.record, name))
        for words in refusals:
            run.console.print(f"{version.text} is not promoted: {words}", highlight=False, soft_wrap=True)
        if not refusals:
            run.console.print(f"{version.text} is {name}:{plan.gates.alias} now", highlight=False)
        kept = sum(file.stat().st_size for one in (self.directory / "outcome").glob("kept-*") for file in one.iterdir())
        memory = (self.directory / "outcome" / "memory.jsonl").read_bytes()
        trained = Facts.parse((self.directory / "outcome" / FACTS_FILE).read_bytes())
        stage = StageRecord(
            task=self.label,
            version=version.text,
            digest=str(version.digest),
            parent=parent,
            row=tuple(scores["row"]),
            metrics=scores["metrics"],
            promoted=not refusals,
            refusals=refusals,
            text_nats=scores["text"],
            seconds=float(trained.metrics.get("seconds", 0.0)),
            adapter_bytes=(place / "adapter_model.safetensors").stat().st_size,
            kept_bytes=kept,
            memory_bytes=len(memory),
            memory_digest=digest_of(memory) if memory else None,
            notes=outcome.notes,
        )
        return replace(
            self.record,
            base_row=tuple(scores["base"]),
            base_text_nats=scores["base_text"],
            stages=(*self.record.stages, stage),
            stopped=bool(refusals) and plan.gates.after_refusal == "stop",
        )


def _with_times_of(first: Facts, further: Sequence[Facts]) -> Facts:
    """The first lesson's facts with the times of a stage's other lessons added to its own."""
    added = {
        name: round(sum(float(one.metrics.get(name, 0.0)) for one in (first, *further)), 3)
        for name in ("seconds", "cpu_seconds")
        if name in first.metrics
    }
    return replace(first, metrics={**first.metrics, **added})
