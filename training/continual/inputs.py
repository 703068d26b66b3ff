"""What the matrices of a model see: second moments of their inputs on given examples or text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from training.answer_loss import LONGEST, padded
from training.data import Example
from training.encode import IGNORED, Encoded, encode, encode_all
from training.text_loss import WINDOW_TOKENS, windows_of

_PREFIX: Final = "base_model.model."
_BATCH: Final = 8
_WINDOWS: Final = 64  # of a text; more text keeps more of what is no task's, see docs/decisions/0052


def input_moments(
    base: Path,
    adapter: Path,
    groups: Sequence[tuple[float, Sequence[Example] | str]],
    *,
    quantized: bool,
    precision: str = "auto",
) -> dict[str, Tensor]:
    """Σ weight · E[x xᵀ] [in, in] float32 of the inputs of every matrix that `adapter` adapts, by module.

    A group is (its weight, examples, or a text of which the first 64 windows of 256 tokens are read). Every token of a
    group counts alike: prompts, answers, and the template's own. The model is the base as a recipe of `precision`
    trains on it (`quantized`: as QLoRA does) with the adapter on; sums are float32. Matrices that read the same input
    share a tensor. Empty where there are no groups. Examples of more than `LONGEST` tokens are left out; raises what
    `training.encode` raises, and `DataTooSmall` for a text of fewer than two tokens.
    """
    from peft import PeftModel
    from transformers import AutoTokenizer

    from training.trainable import dtype_of, load_base

    if not groups:
        return {}
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    rows = [(weight, _rows(base, tokenizer, group)) for weight, group in groups]
    held = dtype_of(precision, "cpu")
    inner: Any = load_base(base, "qlora" if quantized else "lora", LONGEST, "cpu", held)
    model: Any = PeftModel.from_pretrained(inner, str(adapter)).eval()
    reader = _Reader()
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            module.register_forward_pre_hook(reader.hook(name.removeprefix(_PREFIX)))
    with torch.inference_mode():
        for weight, group in rows:
            each = weight / sum(len(one.input_ids) for one in group)
            for begin in range(0, len(group), _BATCH):
                ids, mask, _ = padded(group[begin : begin + _BATCH])
                reader.begin(mask, each)
                model.get_base_model()(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return reader.sums()


def readable(base: Path, examples: Sequence[Example]) -> tuple[Example, ...]:
    """Those that are read whole, of at most `LONGEST` tokens, in their order. Raises what `training.encode` raises."""
    from transformers import AutoTokenizer

    from training.finetune import stop_ids
    from training.template import training_template

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    template, stops = training_template(tokenizer), stop_ids(base, tokenizer)
    return tuple(one for one in examples if len(encode(tokenizer, template, one, stops).input_ids) <= LONGEST)


def _rows(base: Path, tokenizer: Any, group: Sequence[Example] | str) -> list[Encoded]:
    from training.finetune import stop_ids
    from training.template import training_template

    if isinstance(group, str):
        ids = tokenizer(group, add_special_tokens=False, verbose=False).input_ids
        return [Encoded(tuple(one), (IGNORED,) * len(one)) for one in windows_of(ids, WINDOW_TOKENS)[:_WINDOWS]]
    encoded = encode_all(tokenizer, training_template(tokenizer), group, stop_ids(base, tokenizer), LONGEST)
    return sorted(encoded.examples, key=lambda one: len(one.input_ids))


class _Reader:
    """Sums x xᵀ over the tokens of each input, once for matrices that share it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._shares: dict[str, str] = {}  # module → the first one with the same input
        self._last: tuple[str, Any] = ("", None)
        self._weight = 0.0
        self._mask = torch.empty(0, dtype=torch.bool)

    def begin(self, mask: Tensor, weight: float) -> None:
        """The next batch's mask [batch, tokens], 0 where there is only padding, and what each of its tokens counts."""
        self._mask, self._weight, self._last = mask.bool(), weight, ("", None)

    def hook(self, module: str) -> Any:
        """The forward pre-hook of one matrix."""

        def read(_: Any, given: tuple[Any, ...]) -> None:
            first, last = self._last
            if given[0] is last:
                self._shares[module] = first
                return
            self._last = (module, given[0])
            x = given[0][self._mask].float()
            if module in self._sums:
                self._sums[module].addmm_(x.T, x, alpha=self._weight)
            else:
                self._sums[module] = self._weight * (x.T @ x)

        return read

    def sums(self) -> dict[str, Tensor]:
        """All of it, by module."""
        return {**self._sums, **{module: self._sums[first] for module, first in self._shares.items()}}
