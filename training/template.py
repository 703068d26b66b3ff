"""The training chat template: the base's own rendering, with the assistant's tokens marked.

Chat templates as models ship them do not say which tokens the assistant speaks, and a mask computed from one is
silently all zero. A training template renders the same text and wraps each answer, its stop token included, in
`{% generation %}`. That the text is the same is checked when a run starts, on its own data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

from training.data import Example
from training.errors import TemplateMismatch, TemplateUnsupported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ours, each with the rendering it must equal known by the check below, not by name.
_MARKER = re.compile(r"\{%-?\s*generation\b")
_SHIPPED = ("smollm2.jinja",)
# Conversations that every candidate must render as the base's template does.
_PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}],
    [
        {"role": "system", "content": "Count."},
        {"role": "user", "content": " One? \n"},
        {"role": "assistant", "content": " 1 "},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2\n"},
    ],
)


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template that renders as the tokenizer's own and marks the assistant's tokens.

    Taken in this order: the base's own where it has markers, one of ours, one that TRL ships. None where none of them
    renders the same text; `encode` then finds the answers by rendering each conversation up to them. Raises
    `TemplateUnsupported` for a base without a chat template.
    """
    own = tokenizer.chat_template
    if not isinstance(own, str):
        raise TemplateUnsupported("the base has no chat template (or several): train on a chat model")
    for candidate in _candidates(tokenizer, own):
        if _MARKER.search(candidate) and all(_same(tokenizer, candidate, probe) for probe in _PROBES):
            return candidate
    return None


def check_rendering(tokenizer: PreTrainedTokenizerBase, template: str, examples: Sequence[Example]) -> None:
    """Assert, on real examples, that `template` renders what the base's own template renders.

    Raises `TemplateMismatch`, quoting the first place where they part, and `TemplateUnsupported` for an example that
    the base's template refuses.
    """
    for example in examples:
        messages = [message.as_dict() for message in example.messages]
        with naming(example):
            wanted, got = render(tokenizer, messages), render(tokenizer, messages, chat_template=template)
        if wanted != got:
            at = next(
                (i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b), min(len(wanted), len(got))
            )
            raise TemplateMismatch(
                f"the training template renders {got[at : at + 40]!r} where the base's renders {wanted[at : at + 40]!r}"
            )


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    """The conversation as text, by the base's template unless `chat_template` says otherwise.

    Raises `TemplateUnsupported`, with the template's own words, where it refuses the conversation.
    """
    with refusals():
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


@contextmanager
def refusals() -> Iterator[None]:
    """What a template says against a conversation, as `TemplateUnsupported`."""
    from jinja2.exceptions import TemplateError

    try:
        yield
    except TemplateError as error:
        raise TemplateUnsupported(f"the base's chat template refuses the conversation: {error}") from error


@contextmanager
def naming(example: Example) -> Iterator[None]:
    """Says of a `TemplateUnsupported` which example it is about."""
    try:
        yield
    except TemplateUnsupported as error:
        raise TemplateUnsupported(f"the example that asks {example.prompt[-1].content[:60]!r}: {error}") from error


def _candidates(tokenizer: PreTrainedTokenizerBase, own: str) -> list[str]:
    shipped = [resources.files("training").joinpath("templates", name).read_text("utf-8") for name in _SHIPPED]
    return [own, *shipped, *_of_trl(tokenizer)]


def _of_trl(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    from trl.chat_template_utils import get_training_chat_template

    try:
        template = get_training_chat_template(tokenizer)
    except ValueError:  # TRL knows no counterpart
        return []
    return [template] if template is not None else []


def _same(tokenizer: PreTrainedTokenizerBase, candidate: str, probe: list[dict[str, str]]) -> bool:
    try:
        return render(tokenizer, probe) == render(tokenizer, probe, chat_template=candidate)
    except TemplateUnsupported:
        return False
