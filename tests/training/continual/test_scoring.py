"""What the engine's scorer makes of answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.offline import Completion
from server.engine.request import FinishReason
from training.continual.scoring import EngineScorer, Exam
from training.data import Example
from training.engine_generator import EngineGenerator
from training.evaluate import Prompt
from training.tasks import task_named


def test_an_answer_that_was_cut_off_is_none() -> None:
    def done(text: str, reason: FinishReason) -> Completion:
        return Completion(text, (), reason, None, ())

    engine: Any = SimpleNamespace(
        generate=lambda requests: [done("whole", FinishReason.STOP), done("in the mid", FinishReason.LENGTH)],
    )
    prompts = [Prompt(Example.of(user="x", answer="y").prompt, None, 3)] * 2
    assert EngineGenerator(engine, {}).ended(prompts) == ["whole", None]
    assert EngineGenerator(engine, {}).generate(prompts) == ["whole", "in the mid"]


def test_own_answers_that_are_empty_or_cut_off_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(self: EngineScorer, prompts: Sequence[Prompt], how: Any) -> list[str | None]:
        assert how is EngineGenerator.ended
        return ["mixed", None, " "]

    monkeypatch.setattr(EngineScorer, "_asked", asked)
    examples = tuple(Example.of(user=f"{n}", answer="positive") for n in range(3))
    scorer = EngineScorer("tiny", tmp_path, (Exam("first", task_named("sentiment"), examples),))
    assert scorer.answers(tmp_path, examples) == [Example.of(user="0", answer="mixed")]
