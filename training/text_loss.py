"""Cross-entropy on held-out text: whether an adapter has cost the base what it could do before.

The text is not a task's: any UTF-8 file, cut into windows of tokens. Lower is better; base and adapters are compared in
float32, each loaded as PEFT means it, so that quantization and the server's kernels play no part.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional

from server.adapters.weights import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles
from training.errors import DataInvalid, DataTooSmall
from training.metrics import Measured, per_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW_TOKENS: Final = 256


def read_text(path: Path) -> str:
    """The file's text. Raises `DataInvalid` when it is no UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataInvalid(f"{path} is not UTF-8 (byte {error.start})") from error


def text_loss(model: PreTrainedModel, windows: Sequence[Sequence[int]]) -> Measured:
    """Nats a token over `windows` of token ids; the first token of a window is context only."""
    nats, tokens = [], []
    model.eval()
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            nats.append(float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
            tokens.append(len(window) - 1)
    return per_token(nats, tokens)


def windows_of(ids: Sequence[int], length: int) -> list[Sequence[int]]:
    """Neighbouring windows of `length` tokens, a shorter last one where it has anything to predict.

    Raises `DataTooSmall` when there is nothing to predict at all.
    """
    windows = [ids[start : start + length] for start in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise DataTooSmall("the text has fewer than two tokens")
    return windows


def cut(base: Path, text: str) -> list[Sequence[int]]:
    """The text's windows, in the base's tokens. Raises `DataTooSmall` as `windows_of` does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    return windows_of(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, WINDOW_TOKENS)


def text_losses(
    base: Path, adapters: Mapping[str | None, AdapterFiles | None], text: str, limit: int | None = None
) -> dict[str | None, Measured]:
    """The loss of each model; `adapters` maps its name to its files, both None for the base alone.

    The base is read anew for each, since nothing of one adapter may stay behind for the next. `limit` bounds the
    number of windows.
    """
    windows = cut(base, text)[:limit]
    return {name: text_loss(_load(base, files), windows) for name, files in adapters.items()}


def _load(base: Path, files: AdapterFiles | None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    if files is None:
        return model
    with tempfile.TemporaryDirectory() as directory:  # only these two files, so that PEFT can find no pickle
        Path(directory, CONFIG_FILE).write_bytes(files.config)
        Path(directory, WEIGHTS_FILE).write_bytes(files.weights)
        return PeftModel.from_pretrained(model, directory)
