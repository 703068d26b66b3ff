"""Scores of many adapters on many tasks, all answers from one call of the engine that will serve them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

from server.config import EngineLimits, ModelConfig, Quantization
from server.engine.engine import Engine
from training.data import Example, Message
from training.engine_generator import EngineGenerator, check_room, find_adapters
from training.errors import GenerationFailed, TemplateUnsupported
from training.evaluate import Prompt
from training.metrics import Measured
from training.tasks import Task

if TYPE_CHECKING:
    from server.model.base import BaseModel


@dataclass(frozen=True)
class Exam:
    """A task's questions."""

    label: str
    task: Task
    examples: tuple[Example, ...]


A = TypeVar("A")
Cell = tuple[int, Path | None]  # (which exam, an adapter's directory or the base)


class Scorer(Protocol):
    """What a run needs to know of models. Raises `GenerationFailed` when any question stays without an answer."""

    def check(self, first: int) -> None:
        """Raise `GenerationFailed` for a question of the exams from `first` on that no model could be asked."""
        ...

    def scores(self, cells: Sequence[Cell]) -> list[dict[str, float]]:
        """All metrics of each cell."""
        ...

    def answers(self, adapter: Path, examples: Sequence[Example]) -> list[Example]:
        """The same prompts with the adapter's own answers, without those it does not answer, or does not end."""
        ...

    def losses(self, adapters: Sequence[Path], examples: Sequence[Example]) -> list[list[float]]:
        """Nats a token of each example's own answer, with each of the adapters; NaN where it is too long to read."""
        ...

    def inputs(self, adapter: Path, groups: Sequence[tuple[float, Sequence[Example] | None]]) -> dict[str, Tensor]:
        """Σ weight · E[x xᵀ] of every adapted matrix's inputs over groups; None is the text to keep, if any."""
        ...

    def routed(self, choices: Sequence[Sequence[Path | None]]) -> list[dict[str, float]]:
        """All metrics of each exam, each of its questions answered by the model chosen for it."""
        ...

    def text_nats(self, adapters: Sequence[Path | None]) -> list[float]:
        """Cross-entropy of each model on the held-out text, nats a token."""
        ...


@dataclass(frozen=True)
class EngineScorer:
    """Scores through `server.engine`, greedily, every adapter in the same batches."""

    base: str
    base_directory: Path
    exams: tuple[Exam, ...]
    quantize: Quantization = "none"
    threads: int = 0
    text: str | None = None  # the held-out text itself
    text_windows: int = 64
    keep_text: str | None = None  # the text itself on which the base is to be kept
    precision: str = "auto"  # in which inputs are read: the recipe's
    served_rank: int = 0  # the largest of any adapter asked; what a server takes by default always goes

    def check(self, first: int) -> None:
        """See `Scorer`; one too long for the base's context with its answer. Loads no model."""
        from transformers import AutoConfig

        prompts = [
            prompt
            for exam in range(first, len(self.exams))
            for prompt in self._prompts(exam, [None] * len(self.exams[exam].examples))
        ]
        config = AutoConfig.from_pretrained(str(self.base_directory)).get_text_config()
        check_room(prompts, [self._count_prompt(prompt) for prompt in prompts], int(config.max_position_embeddings))

    def scores(self, cells: Sequence[Cell]) -> list[dict[str, float]]:
        """See `Scorer`."""
        return self._measure([(exam, [adapter] * len(self.exams[exam].examples)) for exam, adapter in cells])

    def routed(self, choices: Sequence[Sequence[Path | None]]) -> list[dict[str, float]]:
        """See `Scorer`."""
        return self._measure(list(enumerate(choices)))

    def _measure(self, cells: Sequence[tuple[int, Sequence[Path | None]]]) -> list[dict[str, float]]:
        prompts: list[Prompt] = []
        spans: list[slice] = []
        for exam, adapters in cells:
            begin = len(prompts)
            prompts += self._prompts(exam, adapters)
            spans.append(slice(begin, len(prompts)))
        answers = self._asked(prompts, EngineGenerator.generate)
        return [
            headline_first(
                self.exams[exam].task, self.exams[exam].task.measure(self.exams[exam].examples, answers[span])
            )
            for (exam, _), span in zip(cells, spans, strict=True)
        ]

    def _prompts(self, exam: int, adapters: Sequence[Path | None]) -> list[Prompt]:
        asked = self.exams[exam]
        limit = asked.task.answer_limit(asked.examples, self._count_tokens)
        return [
            Prompt(one.prompt, None if adapter is None else str(adapter), limit, f"{asked.label}, example {number}")
            for number, (one, adapter) in enumerate(zip(asked.examples, adapters, strict=True), 1)
        ]

    def answers(self, adapter: Path, examples: Sequence[Example]) -> list[Example]:
        """See `Scorer`; an answer that the longest of the tasks' limits cut off would teach to stop in the middle."""
        longest = max(exam.task.answer_limit(exam.examples, self._count_tokens) for exam in self.exams)
        asked = [Prompt(one.prompt, str(adapter), longest) for one in examples]
        said = self._asked(asked, EngineGenerator.ended)
        return [
            Example((*one.prompt, Message("assistant", answer)), one.gold)
            for one, answer in zip(examples, said, strict=True)
            if answer is not None and answer.strip()
        ]

    def _count_prompt(self, prompt: Prompt) -> int:
        from training.template import render

        messages = [message.as_dict() for message in prompt.messages]
        try:
            return self._count_tokens(render(self._tokenizer, messages, add_generation_prompt=True))
        except TemplateUnsupported as error:
            raise GenerationFailed(f"{prompt.label}: {error}") from error

    def _count_tokens(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self.base_directory))

    def losses(self, adapters: Sequence[Path], examples: Sequence[Example]) -> list[list[float]]:
        """See `Scorer`; in float32, see `training.answer_loss`."""
        from training.answer_loss import answer_losses

        named = {f"adapter{number}": directory for number, directory in enumerate(adapters)}
        found = answer_losses(self.base_directory, named, examples, quantized=self.quantize == "nf4", with_base=False)
        return [
            [nats / tokens if tokens else math.nan for nats, tokens in found[name].counts.tolist()] for name in named
        ]

    def inputs(self, adapter: Path, groups: Sequence[tuple[float, Sequence[Example] | None]]) -> dict[str, Tensor]:
        """See `Scorer`; see `training.continual.inputs`."""
        from training.continual.inputs import input_moments

        asked = [(weight, self.keep_text if group is None else group) for weight, group in groups]
        read = [(weight, group) for weight, group in asked if group and weight]
        return input_moments(
            self.base_directory, adapter, read, quantized=self.quantize == "nf4", precision=self.precision
        )

    def text_nats(self, adapters: Sequence[Path | None]) -> list[float]:
        """See `Scorer`; in float32, each model by itself, see `training.text_loss`."""
        from training.text_loss import text_losses

        assert self.text is not None
        found = find_adapters([str(one) for one in adapters if one is not None], None)
        files = {None if a is None else str(a): None if a is None else found.fetch(found.uses[str(a)].digest)
                 for a in adapters}  # fmt: skip
        losses = text_losses(self.base_directory, files, self.text, self.text_windows)
        return [losses[None if one is None else str(one)].value for one in adapters]

    def _asked(self, prompts: Sequence[Prompt], how: Callable[[EngineGenerator, Sequence[Prompt]], list[A]]) -> list[A]:
        from server.model.base import load_base

        names = list(dict.fromkeys(prompt.adapter for prompt in prompts if prompt.adapter is not None))
        adapters = find_adapters(names, None)
        config = ModelConfig(base=self.base, quantization=self.quantize, threads=self.threads)
        base = load_base(config)
        with closing(Engine(base, _limits(base, self.served_rank), adapters.fetch)) as engine:
            generator = EngineGenerator(engine, adapters.uses)
            return in_order_of_length(prompts, lambda ordered: how(generator, ordered))


def _limits(base: BaseModel, rank: int) -> EngineLimits:
    """The default limits, with room for one adapter of `rank` where that is more."""
    from server.adapters.arena import blocks, row_bytes

    usual = EngineLimits()
    if rank <= usual.max_adapter_rank:
        return usual
    shapes = {site: (matrix.out_features, matrix.in_features) for site, matrix in base.linears().items()}
    rows = blocks(rank) * row_bytes(shapes, base.dtype)
    return replace(usual, max_adapter_rank=rank, adapter_memory_bytes=max(usual.adapter_memory_bytes, rows))


def in_order_of_length(prompts: Sequence[Prompt], generate: Callable[[Sequence[Prompt]], list[A]]) -> list[A]:
    """The answers, asked shortest prompt first with neighbours of all tasks and adapters, so that batches are full."""
    order = sorted(range(len(prompts)), key=lambda index: sum(len(m.content) for m in prompts[index].messages))
    said = dict(zip(order, generate([prompts[index] for index in order]), strict=True))
    return [said[index] for index in range(len(prompts))]


def headline_first(task: Task, measured: Mapping[str, Measured]) -> dict[str, float]:
    """The metrics by name, the one that the matrix holds first."""
    names = [task.headline, *(name for name in measured if name != task.headline)]
    return {name: measured[name].value for name in names}


def headline(metrics: Mapping[str, float]) -> float:
    """The metric that the matrix holds, see `headline_first`."""
    return next(iter(metrics.values()))
