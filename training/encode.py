"""Examples to token ids and labels, with the mask proven on every one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.data import Example
from training.errors import DataTooSmall, MaskEmpty, StopTokenUntrained, TemplateMismatch, TemplateUnsupported
from training.template import naming, refusals, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that trains nothing


@dataclass(frozen=True)
class Encoded:
    """One example as the model sees it."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]  # as input_ids where the assistant speaks, IGNORED elsewhere

    def as_row(self) -> dict[str, list[int]]:
        """The form the trainer's data set holds."""
        return {"input_ids": list(self.input_ids), "labels": list(self.labels)}


@dataclass(frozen=True)
class EncodedSet:
    """Examples short enough to train on, and how many were not."""

    examples: tuple[Encoded, ...]
    too_long: int

    @property
    def tokens(self) -> int:
        """All tokens of one pass."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def label_tokens(self) -> int:
        """The tokens of one pass that the loss looks at."""
        return sum(label != IGNORED for example in self.examples for label in example.labels)


def encode(
    tokenizer: PreTrainedTokenizerBase, template: str | None, example: Example, stop_ids: frozenset[int]
) -> Encoded:
    """Token ids and labels of one conversation.

    `template` is a training template or None, `stop_ids` are the tokens on which generation stops. Raises `MaskEmpty`
    when nothing would be trained, `StopTokenUntrained` when an answer's mask does not end on a stop token, and
    `TemplateMismatch` when the tokens in front of the last answer are not those a server sends for the same prompt,
    `TemplateUnsupported` when the base's template refuses the conversation.
    """
    with naming(example):
        return _encoded(tokenizer, template, example, stop_ids)


def _encoded(
    tokenizer: PreTrainedTokenizerBase, template: str | None, example: Example, stop_ids: frozenset[int]
) -> Encoded:
    messages = [message.as_dict() for message in example.messages]
    if template is None:
        ids, mask = _masked_by_prefixes(tokenizer, messages, stop_ids)
    else:
        with refusals():
            processed = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        ids, mask = list(processed["input_ids"]), [bool(on) for on in processed["assistant_masks"]]
    ends = [at for at, on in enumerate(mask) if on and (at + 1 == len(mask) or not mask[at + 1])]
    if not ends:
        raise MaskEmpty(f"the assistant mask selects no token of the example that begins {_begin(example)!r}")
    for end in ends:
        if ids[end] not in stop_ids:
            raise StopTokenUntrained(
                f"an answer's mask ends on {tokenizer.decode([ids[end]])!r}, on which generation does not stop"
            )
    start = ends[-1]
    while start > 0 and mask[start - 1]:
        start -= 1
    prompt = render(tokenizer, messages[:-1], add_generation_prompt=True)
    if ids[:start] != list(tokenizer(prompt, add_special_tokens=False).input_ids):
        raise TemplateMismatch(f"a server tokenizes the prompt of {_begin(example)!r} otherwise than training does")
    labels = tuple(token if on else IGNORED for token, on in zip(ids, mask, strict=True))
    return Encoded(tuple(ids), labels)


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    examples: Sequence[Example],
    stop_ids: frozenset[int],
    max_length: int,
) -> EncodedSet:
    """All examples of at most `max_length` tokens; longer ones are left out whole, for a cut answer teaches cutting.

    Raises what `encode` raises, and `DataTooSmall` when none is short enough.
    """
    encoded = [encode(tokenizer, template, example, stop_ids) for example in examples]
    kept = tuple(example for example in encoded if len(example.input_ids) <= max_length)
    if not kept:
        raise DataTooSmall(f"none of the {len(encoded)} examples has {max_length} tokens or fewer; raise --max-length")
    return EncodedSet(kept, len(encoded) - len(kept))


def _masked_by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], stop_ids: frozenset[int]
) -> tuple[list[int], list[bool]]:
    """(token ids, mask) with no markers to go by: an answer is what the template adds to the prompt before it.

    Of what it adds, everything behind the stop token (a line break, as a rule) is not the assistant's. Raises
    `TemplateUnsupported` where a conversation does not begin with the rendering of its own beginning.
    """
    text = render(tokenizer, messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    mask = [False] * len(ids)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = render(tokenizer, messages[:turn], add_generation_prompt=True)
        upto = render(tokenizer, messages[: turn + 1])
        if not (upto.startswith(head) and text.startswith(upto)):
            raise TemplateUnsupported(
                "this base's chat template renders a conversation otherwise once it goes on, so its answers cannot be "
                "told apart; add a template to training/templates/ with {% generation %} around each answer"
            )
        inside = [at for at, (begin, _) in enumerate(encoded["offset_mapping"]) if len(head) <= begin < len(upto)]
        while inside and ids[inside[-1]] not in stop_ids:
            inside.pop()
        for at in inside:
            mask[at] = True
    return ids, mask


def _begin(example: Example) -> str:
    return example.messages[-2].content[:60]
