"""Prompts as the frozen base sees them, for the router."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from training.continual.router import embed, middle_layer
from training.continual.run import Embed
from training.data import Example


def embedder(base: Path) -> tuple[Embed, int]:
    """(what embeds prompts as the base's chat template renders them, the layer it takes); loaded when first used.

    The states are those of the base as its files have it, whatever it is held in elsewhere.
    """
    from transformers import AutoConfig

    layer = middle_layer(AutoConfig.from_pretrained(str(base)))

    @lru_cache(maxsize=1)
    def loaded() -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(str(base), dtype="auto"), AutoTokenizer.from_pretrained(str(base))

    def embedded(examples: Sequence[Example]) -> Tensor:
        model, tokenizer = loaded()
        rows = []
        for one in examples:
            messages = [message.as_dict() for message in one.prompt]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            rows.append(tokenizer(text, add_special_tokens=False).input_ids)
        return embed(model, rows, layer)

    return embedded, layer
