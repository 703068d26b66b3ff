"""Held-out text: the loss is the model's own, adapters count, and nothing of one stays for the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from training.engine_generator import find_adapters
from training.errors import DataInvalid, DataTooSmall
from training.text_loss import WINDOW_TOKENS, read_text, text_losses, windows_of

TEXT = "".join(chr(97 + (n * n) % 26) + " " * (n % 5 == 0) for n in range(500))


def test_the_loss_is_that_of_transformers_and_peft(
    tiny_base: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directories = [make_adapter(tiny_base, tmp_path / name, seed=seed, r=4) for seed, name in enumerate(("a", "b"), 1)]
    adapters = find_adapters([str(directory) for directory in directories], None)
    files = {str(d): adapters.fetch(adapters.uses[str(d)].digest) for d in directories}
    found = text_losses(tiny_base, {None: None, **files}, TEXT)
    assert len({measured.value for measured in found.values()}) == 3

    ids = AutoTokenizer.from_pretrained(tiny_base)(TEXT, add_special_tokens=False).input_ids
    for directory in (None, *directories):
        model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, directory) if directory is not None else model
        total, tokens = 0.0, 0
        with torch.inference_mode():
            for window in windows_of(ids, WINDOW_TOKENS):
                row = torch.tensor([window])
                total += float(model(input_ids=row, labels=row).loss) * (len(window) - 1)
                tokens += len(window) - 1
        assert tokens > WINDOW_TOKENS
        measured = found[str(directory) if directory is not None else None]
        assert measured.value == pytest.approx(total / tokens, rel=1e-5)
        assert measured.counts[:, 1].sum() == tokens


def test_windows() -> None:
    assert windows_of(range(7), 3) == [range(3), range(3, 6)]  # one token predicts nothing
    assert windows_of(range(8), 3)[-1] == range(6, 8)
    with pytest.raises(DataTooSmall):
        windows_of([1], 3)


def test_text_that_is_none_is_refused(tmp_path: Path) -> None:
    (path := tmp_path / "text").write_bytes(b"\xff\x00")
    with pytest.raises(DataInvalid, match="UTF-8"):
        read_text(path)
