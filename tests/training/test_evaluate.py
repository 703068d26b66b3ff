"""Evaluation: every model gets every question, in one mixed batch of the engine that serves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from hub.errors import HubError
from hub.hub import Hub
from training.data import Example, Message
from training.engine_generator import Adapters, EngineGenerator, find_adapters
from training.errors import DataInvalid, GenerationFailed
from training.evaluate import Prompt, evaluate
from training.tasks import task_named


class Echo:
    """Answers with the adapter's name, and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def generate(self, prompts: Sequence[Prompt]) -> list[str]:
        self.calls += 1
        return [prompt.adapter or "I think it is mixed" for prompt in prompts]


def test_each_model_is_scored_on_its_own_answers_from_one_call() -> None:
    examples = [Example.of(user=f"text {n}", answer=label) for n, label in enumerate(["positive", "mixed", "positive"])]
    echo = Echo()
    comparison = evaluate(task_named("sentiment"), examples, ["positive", None, "negative"], echo)
    assert echo.calls == 1 and comparison.examples == 3
    assert [result.model for result in comparison.results] == ["positive", "base", "negative"]
    assert [result.metrics["accuracy"] for result in comparison.results] == pytest.approx([2 / 3, 1 / 3, 0.0])
    assert comparison.results[2].answers == ("negative",) * 3


@pytest.fixture
def two_adapters(tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    return (
        make_adapter(tiny_base, tmp_path / "first", seed=1, r=4),
        make_adapter(tiny_base, tmp_path / "second", seed=2, r=12),
    )


@pytest.fixture
def generator(tiny_base: Path, two_adapters: tuple[Path, Path]) -> Iterator[EngineGenerator]:
    with closing(engine(tiny_base, adapters := find_adapters([str(path) for path in two_adapters], None))) as built:
        yield EngineGenerator(built, adapters.uses)


def engine(base: Path, adapters: Adapters) -> Any:
    from server.config import EngineLimits, ModelConfig
    from server.engine.engine import Engine

    config = ModelConfig(base=str(base), quantization="none", dtype="float32", threads=1)
    limits = EngineLimits(max_waiting=4, kv_memory_bytes=2**22, adapter_memory_bytes=2**22)
    return Engine.build(config, limits, adapters.fetch)


def test_how_many_answers_ended_at_the_limit_is_known(generator: EngineGenerator) -> None:
    cut = Example.of(user="question", answer="x")
    comparison = evaluate(task_named("own-text"), [cut], [None], generator, 3)
    assert comparison.max_new_tokens == 3 and generator.cut_off[None] in (0, 1)
    [answer] = comparison.results[0].answers
    whole = generator.generate([prompt("question", None, 60)])[0]
    assert (answer != whole) <= generator.cut_off[None] and generator.count_tokens("abc") == 3


def test_examples_that_cannot_be_scored_are_refused_before_anyone_is_asked() -> None:
    echo = Echo()
    with pytest.raises(DataInvalid, match="example 1"):
        evaluate(task_named("iam-policy"), [Example.of(user="q", answer="billing")], [None], echo)
    assert echo.calls == 0


def prompt(text: str, adapter: str | None, tokens: int = 8) -> Prompt:
    return Prompt((Message("user", text),), adapter, tokens)


def test_a_mixed_batch_answers_as_each_model_alone(generator: EngineGenerator, two_adapters: tuple[Path, Path]) -> None:
    models = [None, *(str(path) for path in two_adapters)]
    prompts = [prompt(f"question {n}", models[n % 3]) for n in range(9)]  # more than the engine may queue
    together = generator.generate(prompts)
    alone = [generator.generate([one])[0] for one in prompts]
    assert together == alone
    same = generator.generate([prompt("who are you?", model) for model in models])
    assert len(set(same)) == 3


def test_a_prompt_that_cannot_be_answered_fails_the_evaluation_before_any_is_asked(
    generator: EngineGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitted: list[Any] = []
    monkeypatch.setattr(generator._engine, "submit", lambda *given: submitted.append(given))
    with pytest.raises(GenerationFailed, match=r"'long long.*context of 512; shorten"):
        generator.generate([prompt("short", None), prompt("long " * 200, None)])
    examples = [Example.of(user=text, answer="mixed") for text in ("short", "long " * 200, "longer " * 200)]
    with pytest.raises(GenerationFailed, match=r"^example 2: a prompt of 1\d\d\d tokens.* 512, nor do 1 more"):
        evaluate(task_named("sentiment"), examples, [None], generator)
    assert not submitted


def test_an_adapter_of_another_base_fails_the_evaluation(
    tiny_base: Path, two_adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    weights = two_adapters[0] / "adapter_model.safetensors"
    wrong = {name: tensor.repeat(2, 1) if "lora_B" in name else tensor for name, tensor in load_file(weights).items()}
    save_file(wrong, weights)
    adapters = find_adapters([str(two_adapters[0])], None)
    with closing(engine(tiny_base, adapters)) as built, pytest.raises(GenerationFailed, match="first"):
        EngineGenerator(built, adapters.uses).generate([prompt("hello", str(two_adapters[0]))])


def test_adapters_are_found_as_directories_and_as_references(two_adapters: tuple[Path, Path], tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        pushed = hub.push(two_adapters[0], "team/first", aliases=("prod",)).version
        found = find_adapters(["team/first:prod", str(two_adapters[1])], hub)
        assert found.uses["team/first:prod"].digest == pushed.digest
        assert found.uses["team/first:prod"].version == "team/first@1"
        files = found.fetch(pushed.digest)
        assert files.weights == (two_adapters[0] / "adapter_model.safetensors").read_bytes()
        assert found.fetch(found.uses[str(two_adapters[1])].digest).config
        with pytest.raises(HubError, match="team/absent"):
            find_adapters(["team/absent"], hub)
