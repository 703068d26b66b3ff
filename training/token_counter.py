"""How many tokens a base makes of an example."""

from __future__ import annotations

from collections.abc import Callable

from training.data import Example

CountTokens = Callable[[Example], tuple[int, int]]
"""Tokens of (the whole conversation, its answer); raises `TemplateUnsupported` where the base's template refuses it."""


def token_counter(base: str) -> CountTokens:
    """Counts with the tokenizer and the training template of `base`; raises where there is no such base."""
    from transformers import AutoTokenizer

    from hub.base import locate_base
    from training.template import render

    tokenizer = AutoTokenizer.from_pretrained(str(locate_base(base).directory))

    def count(example: Example) -> tuple[int, int]:
        whole = render(tokenizer, [message.as_dict() for message in example.messages])
        ids = tokenizer([whole, example.answer], add_special_tokens=False, verbose=False).input_ids
        return len(ids[0]), len(ids[1])

    return count
