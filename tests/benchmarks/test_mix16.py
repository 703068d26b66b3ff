"""The benchmark measures what it says: turns, medians, equal work, adapters that are real PEFT adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.mix16 import Score, measure, table
from benchmarks.worker import Run, Worker
from benchmarks.workload import ALPHA, CASES, RANK, TARGETS, Case, write_adapters
from hub.adapter_dir import parse_adapter
from hub.base import fingerprint_directory

NEW_TOKENS = 4


class ScriptedWorker:
    """Answers at a set speed and writes down when it was asked."""

    def __init__(
        self, name: str, journal: list[tuple[str, str]], seconds: list[float], tokens: int = NEW_TOKENS
    ) -> None:
        self.name, self.journal, self.seconds, self.tokens = name, journal, seconds, tokens

    def run(self, case: Case) -> Run:
        self.journal.append((self.name, case.name))
        return Run(self.seconds.pop(0), [[7] * self.tokens] * case.prompts)


def workers(**scripted: ScriptedWorker) -> dict[str, Worker]:
    return {name: cast(Worker, worker) for name, worker in scripted.items()}


def test_engines_take_turns_and_the_first_round_does_not_count() -> None:
    journal: list[tuple[str, str]] = []
    mix = tuple(case for case in CASES if case.name == "mix16")
    both = workers(
        peft=ScriptedWorker("peft", journal, [99, 2, 8, 4]), loraplex=ScriptedWorker("loraplex", journal, [99, 1, 1, 1])
    )

    scores = {score.engine: score for score in measure(both, mix, rounds=3, new_tokens=NEW_TOKENS)}

    assert [engine for engine, _ in journal] == ["peft", "loraplex"] * 4
    assert scores["peft"].tokens_per_second == [32, 8, 16]
    assert scores["peft"].median == 16
    assert scores["loraplex"].median == 64
    assert scores["loraplex"].first_tokens_equal == 1


def test_an_engine_that_answers_less_is_not_measured() -> None:
    lazy = workers(loraplex=ScriptedWorker("loraplex", [], [1.0], tokens=NEW_TOKENS - 1))

    with pytest.raises(SystemExit, match="loraplex did not answer solo base with 4 tokens a prompt"):
        measure(lazy, CASES[:1], rounds=1, new_tokens=NEW_TOKENS)


def test_the_table_says_what_is_kept() -> None:
    scores = [Score("loraplex", case.name, [rate], 1.0) for case, rate in zip(CASES, (20, 10, 200, 150), strict=True)]

    assert table(scores, CASES).splitlines()[-1] == "| Loraplex, bf16 | 20 | 10 | 200 | 150 | 75% | 100% |"


def test_adapters_are_sound_distinct_and_change_every_linear(tiny_base: Path, tmp_path: Path) -> None:
    first, second = (parse_adapter(directory) for directory in write_adapters(tiny_base, tmp_path, 2))

    first.check_binds(fingerprint_directory(tiny_base).shapes)
    assert (first.config.r, first.config.lora_alpha) == (RANK, ALPHA)
    assert first.tensors_digest != second.tensors_digest
    assert len({name for name in cast(Any, first).tensors if "lora_B" in name}) == 2 * len(TARGETS)
