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
        text=SimpleNamespace(render_chat=lambda messages: [1, 2, 3]),
        base=SimpleNamespace(context_tokens=512),
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


def test_the_users_own_answers_have_room(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def asked(self: EngineScorer, prompts: Sequence[Prompt], how: Any) -> list[str]:
        limits.extend(prompt.max_new_tokens for prompt in prompts)
        return ["" for _ in prompts]

    monkeypatch.setattr(EngineScorer, "_asked", asked)
    long, short = (task_named(name) for name in ("own-label", "sentiment"))
    exams = (
        Exam("mine", long, (Example.of(user="x", answer="refund " * 30),)),
        Exam("theirs", short, (Example.of(user="x", answer="positive"),)),
    )
    EngineScorer("tiny", tiny_base, exams).scores([(0, None), (1, None)])
    assert limits[0] > 30 > long.max_new_tokens
    assert limits[1] == short.max_new_tokens
