"""Cross-entropy of the answers that a task's questions have: finer than right or wrong, on the same questions.

Nats a token of the reference answer, its stop token included, given the prompt; products in float32, an NF4 base as
QLoRA trains on it. Where there are several right answers only the one that the data gives counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from training.data import Example
from training.encode import IGNORED, Encoded, encode
from training.loss import label_losses
from training.metrics import Measured, per_token

METRIC: Final = "answer_nats"
_BATCH: Final = 8
LONGEST: Final = 4096  # tokens of a question with its answer; a longer one is left out


def answer_losses(
    base: Path, adapters: Mapping[str, Path], examples: Sequence[Example], *, quantized: bool, with_base: bool = True
) -> dict[str | None, Measured]:
    """The loss of every adapter (PEFT directories, by name) and of the base (None) on the same `examples`.

    Names are PEFT's adapter names, so without dots. An example of more than `LONGEST` tokens counts nothing: its nats
    and its tokens are 0. Raises what `training.encode` raises.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    from training.finetune import stop_ids
    from training.template import training_template
    from training.trainable import load_base

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    template, stops = training_template(tokenizer), stop_ids(base, tokenizer)
    encoded = [encode(tokenizer, template, example, stops) for example in examples]
    model: Any = load_base(base, "qlora" if quantized else "lora", LONGEST, "cpu", torch.float32)
    found: dict[str | None, Measured] = {}
    if with_base:
        found[None] = _measured(model, encoded)
    for name, directory in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(str(directory), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(directory), adapter_name=name)
        model.set_adapter(name)
        found[name] = _measured(model.get_base_model(), encoded)
        model.delete_adapter(name)
    return found


def _measured(model: Any, examples: Sequence[Encoded]) -> Measured:
    nats, tokens = [0.0] * len(examples), [0] * len(examples)
    read = [at for at, example in enumerate(examples) if len(example.input_ids) <= LONGEST]
    order = sorted(read, key=lambda at: len(examples[at].input_ids))
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            losses, counts = label_losses(model, *padded([examples[at] for at in rows]))
            for at, loss, count in zip(rows, losses.tolist(), counts.tolist(), strict=True):
                nats[at], tokens[at] = loss, count
    return per_token(nats, tokens)


def padded(examples: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(input ids, attention mask, labels), each [batch, longest], padded on the right."""
    longest = max(len(example.input_ids) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
        mask[row, : len(example.input_ids)] = 1
    return ids, mask, labels
