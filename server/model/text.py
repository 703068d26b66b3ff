"""Text in and out: the tokenizer, the base's own chat template, and detokenizing one token at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from jinja2.exceptions import TemplateError
from tokenizers.decoders import DecodeStream

from server.errors import InvalidRequest
from server.model.base import BaseModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NFC_JOINS: Final = 4  # characters at most, of which composition makes one


class Text:
    """The base's tokenizer as the server uses it. Methods may be called from any thread."""

    def __init__(self, base: BaseModel) -> None:
        self._tokenizer: PreTrainedTokenizerBase = base.tokenizer
        self._backend = base.tokenizer.backend_tokenizer
        self.eos_ids = _eos_ids(base)

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, with whatever the base puts in front of a text."""
        return list(self._tokenizer(text).input_ids)

    def render_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation by the base's chat template, ready for the assistant to answer.

        Raises `InvalidRequest` when the base has no template or the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequest("this base has no chat template; send text or token_ids")
        try:
            rendered = self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise InvalidRequest(f"the base's chat template refuses these messages: {error}") from error
        return list(self._tokenizer(rendered, add_special_tokens=False).input_ids)

    @cached_property
    def longest_token(self) -> int | None:
        """The most characters of a text that one token can stand for; None where there is no telling."""
        return longest_token(json.loads(self._backend.to_str()))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of `token_ids` without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """Each token's text on its own."""
        return [str(self._tokenizer.decode([token])) for token in token_ids]

    def stream(self) -> Detokenizer:
        """A fresh detokenizer for one answer."""
        return Detokenizer(self)


class Detokenizer:
    """Text of one answer, token by token; holds back bytes that do not yet make a character."""

    def __init__(self, text: Text) -> None:
        self._backend = text._backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._emitted = 0  # characters of `_ids`' text that are out

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, often one word, sometimes nothing."""
        self._ids.append(token_id)
        try:
            piece = self._stream.step(self._backend, token_id) or ""
        except Exception:  # it has no other class
            return self._restart(token_id)
        self._emitted += len(piece)
        return piece

    def flush(self) -> str:
        """What was held back, at the end: an unfinished character comes out as U+FFFD."""
        return self._decode(self._ids)[self._emitted :]

    def _restart(self, token_id: int) -> str:
        """The rest of the text where its beginning is no longer what was emitted.

        Byte fallback decodes a run of byte tokens as a whole: a character that is out is U+FFFD when the run ends in
        half of another one. What is out stays; the token after the run begins a text of its own.
        """
        piece = self._decode(self._ids)[self._emitted :]
        self._ids = [token_id]
        self._stream = DecodeStream(ids=self._ids, skip_special_tokens=True)
        self._emitted = len(self._decode(self._ids))
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=True))


class StopScanner:
    """Watches an answer's text for stop strings, also across tokens.

    Text that could be the beginning of a stop string is held back until it is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str, counts: bool = True) -> tuple[str, bool]:
        """(text that may be shown, whether a stop string was met; it and what follows are dropped).

        A stop string is met where its last character is in `text`. `counts`: whether any may be met so far; what
        begins in text where none may is held back all the same.
        """
        if not self._stops:
            return text, False
        known = len(self._held)
        self._held += text
        if counts:
            found = [self._held.find(stop, max(0, known - len(stop) + 1)) for stop in self._stops]
            if max(found) >= 0:
                shown, self._held = self._held[: min(at for at in found if at >= 0)], ""
                return shown, True
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, False

    def flush(self) -> str:
        """What was held back, when the answer ends for another reason."""
        shown, self._held = self._held, ""
        return shown


def longest_token(tokenizer: Mapping[str, Any]) -> int | None:
    """The most characters of a text that one token can stand for, by a tokenizer.json; None where it does not tell.

    It tells of byte-level BPE, which says every byte of a text, after no normalizer or NFC; and where no added token
    takes the spaces around it along.
    """
    model, added = tokenizer["model"], tokenizer.get("added_tokens") or ()
    normalizer = tokenizer.get("normalizer")
    if model.get("type") != "BPE" or not _byte_level(tokenizer.get("pre_tokenizer")):
        return None
    if normalizer is not None and normalizer.get("type") != "NFC":
        return None
    if any(token.get("lstrip") or token.get("rstrip") for token in added):
        return None
    tokens = [*model["vocab"], *(token["content"] for token in added)]
    return max(map(len, tokens), default=1) * (1 if normalizer is None else _NFC_JOINS)


def _byte_level(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether it turns all bytes into tokens' characters, one each, and drops nothing."""
    if pre_tokenizer is None:
        return False
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        *first, last = pre_tokenizer["pretokenizers"]
        return _byte_level(last) and all(
            one.get("type") == "Digits" or (one.get("type") == "Split" and one.get("behavior") != "Removed")
            for one in first
        )
    return bool(kind == "ByteLevel")


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def _eos_ids(base: BaseModel) -> frozenset[int]:
    ids: set[int] = set()
    for given in (getattr(base.model.generation_config, "eos_token_id", None), base.tokenizer.eos_token_id):
        if isinstance(given, int):
            ids.add(given)
        elif given is not None:
            ids.update(given)
    return frozenset(ids)
