"""What the training tests share: the real tokenizer, a tiny base's data, and a generator that needs no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from training import trainable
from training.data import Example, write_jsonl


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def byte_tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


@pytest.fixture(scope="session")
def conversations() -> tuple[Example, ...]:
    """Twenty short questions of different lengths."""
    return tuple(
        Example.of(system="Say the colour.", user=f"Number {'i' * (number % 7)}{number}?", answer=colour)
        for number, colour in zip(range(20), ["red", "green", "blue", "teal"] * 5, strict=True)
    )


@pytest.fixture
def chat_file(tmp_path: Path, conversations: tuple[Example, ...]) -> Path:
    path = tmp_path / "chat.jsonl"
    write_jsonl(path, conversations)
    return path


@pytest.fixture
def single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact comparisons need float32, also where bfloat16 is faster."""
    monkeypatch.setattr(trainable, "bfloat16_is_fast", lambda device: False)
