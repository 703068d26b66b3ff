"""Structured output: what an answer may be, compiled once, then asked before every token.

llguidance does the parsing. Its work is bounded by `_LIMITS` in every step, so that no schema or pattern can hold
the engine; what runs into a limit ends its own request.
"""

from __future__ import annotations

import copy
import json
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hub.json_text import parse_object
from server.engine.request import Structure
from server.errors import StructureInvalid

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

MAX_BYTES = 1024 * 1024  # of any structure's text; the front's own limit is lower
MAX_REPEAT = 4096  # x{5000}: a counted repetition costs time and memory by its count
CACHED = 128
_LIMITS = {
    "initial_lexer_fuel": 500_000,  # about 10 ms
    "step_lexer_fuel": 100_000,  # about 7 ms
    "step_max_items": 20_000,  # about 1 ms
    "max_lexer_states": 20_000,  # about 40 MB at the very worst
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# One blank after the separators, as models have seen it, and none where a random walk could add them for ever.
_JSON_STYLE = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_JSON_STRICT = {"lenient": False, "coerce_one_of": False}
_COUNT = re.compile(r"\{\s*(\d*)\s*,?\s*(\d*)\s*\}")
_NOTHING = "no text can follow"
# How llguidance says that a limit was met, and what it adds for those who write grammars for a tokenizer.
_TOO_COMPLEX = re.compile(r"(lexer|parser) error: |initial lexer configuration|(Lexer|Parser)TooComplex")
_INNER = re.compile(r"; following special tokens are available.*|(?<=Regex is empty):.*")
_REGEX_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~]")


class StructureState:
    """Where one answer stands in its structure."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, eos_ids: Set[int], *, may_end: bool) -> None:
        """`may_end` False: the end-of-sequence token never comes, the answer ends when nothing else can follow."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._may_end = may_end
        self.complete = False  # the answer is whole and nothing can follow
        self.failed: str | None = None
        self._allowed: Tensor | None = None  # [vocabulary] bool, without the end of sequence
        self._ends: list[int] = []  # the end-of-sequence ids, where the answer may end
        self._look()

    def fork(self, *, may_end: bool) -> StructureState:
        """A state of its own at the same place; nothing is computed again."""
        other = copy.copy(self)
        other._matcher = self._matcher.deep_copy()
        other._may_end = may_end
        return other

    def allowed(self) -> Tensor | None:
        """[vocabulary] bool, on the CPU: what may follow; None where nothing can."""
        if self._allowed is None:
            return None
        ends = self._ends if self._may_end else []
        if not ends:
            return self._allowed
        mask = self._allowed.clone()
        mask[ends] = True
        return mask

    def restrict(self, logits: Tensor) -> str | None:
        """Set the logits [vocabulary] of what cannot follow to -inf; returns why not, where nothing can."""
        if self._allowed is None:
            return self.failed or "the structure allows nothing more"
        ends = self._ends if self._may_end else []
        kept = logits[ends]
        logits.masked_fill_(~self._allowed, float("-inf"))
        logits[ends] = kept
        if not bool(torch.isfinite(logits.max())):
            return "every token that the structure allows here is forbidden by min_new_tokens"
        return None

    def accept(self, token_id: int) -> None:
        """Move on by one token, and find out at once what may follow it."""
        self._matcher.consume_token(token_id)
        self._look()

    def _look(self) -> None:
        self._allowed = None
        if self._matcher.is_error():
            self.failed = _told(self._matcher.get_error(), "the structure cannot be followed further")
            return
        if self._matcher.is_stopped():
            self.complete = True
            return
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            self.failed = _told(self._matcher.get_error(), "the structure cannot be followed further")
            return
        allowed = np.zeros(self._vocabulary, dtype=np.bool_)
        known = np.unpackbits(bits, bitorder="little")[: self._vocabulary]
        allowed[: known.size] = known
        self._ends = [token for token in self._eos_ids if token < self._vocabulary and allowed[token]]
        allowed[self._ends] = False
        self.complete = bool(self._ends) and not allowed.any()
        self._allowed = torch.from_numpy(allowed)


class Structures:
    """Compiles structures for one tokenizer and keeps the last ones. Methods may be called from any thread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, eos_ids: Set[int]) -> None:
        self._hf = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = eos_ids
        self._lock = threading.Lock()
        self._building = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Structure, StructureState] = OrderedDict()

    def compile(self, structure: Structure) -> None:
        """Make `begin` quick; takes milliseconds, the first time about a second.

        Raises `StructureInvalid` for what is malformed, too large, not supported, or matched by no text.
        """
        with self._lock:
            known = structure in self._compiled
        if not known:
            self._keep(structure, self._first(structure))

    def begin(self, structure: Structure, *, may_end: bool) -> StructureState:
        """The state before the first token. Raises as `compile`, unless that was done."""
        with self._lock:
            first = self._compiled.get(structure)
            if first is not None:
                self._compiled.move_to_end(structure)
        if first is None:
            first = self._first(structure)
            self._keep(structure, first)
        return first.fork(may_end=may_end)

    def _keep(self, structure: Structure, first: StructureState) -> None:
        with self._lock:
            self._compiled[structure] = first
            while len(self._compiled) > CACHED:
                self._compiled.popitem(last=False)

    def _first(self, structure: Structure) -> StructureState:
        from llguidance import LLMatcher, LLParserLimits

        grammar = _grammar(structure)
        limits = LLParserLimits(**_LIMITS)  # type: ignore[arg-type]
        matcher = LLMatcher(self._llguidance(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise StructureInvalid(f"{structure.kind}: {_told(matcher.get_error(), 'it cannot be compiled')}")
        # A grammar that no text matches shows only when the first token is asked for.
        first = StructureState(matcher, self._vocabulary, self._eos_ids, may_end=False)
        if first.failed is not None:
            why = "no text matches it" if first.failed == _NOTHING else first.failed
            raise StructureInvalid(f"{structure.kind}: {why}")
        if first.complete:
            raise StructureInvalid(f"{structure.kind}: only the empty text matches it")
        return first

    def _llguidance(self) -> LLTokenizer:
        with self._building:
            if self._tokenizer is None:
                from llguidance import LLTokenizer

                self._tokenizer = LLTokenizer(
                    _unspellable(self._hf.backend_tokenizer.to_str()),
                    n_vocab=max(self._vocabulary, len(self._hf)),
                    eos_token=sorted(self._eos_ids) or None,
                )
            return self._tokenizer


def _unspellable(tokenizer: str) -> str:
    """A tokenizer in the JSON of `tokenizers`, its special tokens renamed to what no text says; ids stay.

    llguidance tokenizes what must come next, and a text that says "<|im_end|>" has to be written in ordinary tokens:
    the special one would show no text, and end the answer.
    """
    parts = json.loads(tokenizer)
    parts["padding"] = parts["truncation"] = None
    model = parts["model"]
    pieces = model.get("vocab")
    secret = secrets.token_hex(16)
    for token in parts["added_tokens"]:
        if not token["special"]:
            continue
        old, token["content"] = token["content"], secret + token["content"]
        # Where the model lists it too, it must there have the new name, or the new name would get a new id.
        if isinstance(pieces, dict) and old in pieces:
            pieces[token["content"]] = pieces.pop(old)
        elif isinstance(pieces, list) and token["id"] < len(pieces):  # Unigram: [piece, score] by id
            pieces[token["id"]][0] = token["content"]
        if model.get("unk_token") == old:
            model["unk_token"] = token["content"]
    return json.dumps(parts)


def _grammar(structure: Structure) -> str:
    """llguidance's own form. Raises `StructureInvalid`."""
    from llguidance import LLMatcher

    texts = (structure.text, *structure.choices)
    if sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) > MAX_BYTES:
        raise StructureInvalid(f"{structure.kind}: more than {MAX_BYTES} bytes")
    match structure.kind:
        case "json_schema":
            schema = _schema(structure.text)
            for pattern in _patterns(schema):
                _check_counts("json_schema", pattern)
            text = json.dumps(schema)
            return LLMatcher.grammar_from_json_schema(text, _JSON_STYLE, _JSON_STRICT)  # type: ignore[arg-type]
        case "regex":
            _check_counts("regex", structure.text)
            return LLMatcher.grammar_from_regex(structure.text)
        case "grammar":
            _check_counts("grammar", structure.text)
            return LLMatcher.grammar_from_lark(structure.text)
        case "choice":
            if not structure.choices or not all(structure.choices):
                raise StructureInvalid("choice: name at least one text, and none that is empty")
            return LLMatcher.grammar_from_regex(
                "|".join(_REGEX_SPECIAL.sub(r"\\\g<0>", text) for text in structure.choices)
            )


def _schema(text: str) -> dict[str, Any]:
    try:
        return parse_object(text.encode("utf-8"), max_bytes=MAX_BYTES)
    except (ValueError, UnicodeEncodeError) as error:
        raise StructureInvalid(f"json_schema {error}") from error


def _patterns(schema: Any) -> Iterator[str]:
    """Every regular expression in a schema, and what only looks like one."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "pattern" and isinstance(value, str):
                yield value
            elif key == "patternProperties" and isinstance(value, dict):
                yield from value
            yield from _patterns(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _patterns(value)


def _check_counts(kind: str, pattern: str) -> None:
    for match in _COUNT.finditer(pattern):
        for count in match.groups():
            # Not int(): a number of ten thousand digits is a cost of its own.
            if len(count.lstrip("0")) > 4 or (count and int(count) > MAX_REPEAT):
                raise StructureInvalid(f"{kind}: a part is repeated more than {MAX_REPEAT} times")


def _told(error: str, otherwise: str) -> str:
    """llguidance's message in one line a caller can use; `otherwise` where it speaks of its own insides."""
    text = error.replace("<non-verbose/>", "").strip()
    if text.startswith("NoExtension"):
        return _NOTHING
    if _TOO_COMPLEX.match(text):
        return "it is too complex"
    if text.startswith("Parser Error"):
        return otherwise
    head, *lines = text.splitlines() or [""]
    # A regular expression's parser ends with the one line that says why; an excerpt of the grammar follows others.
    whys = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if whys:
        return f"invalid regex: {whys[-1]}"[:300]
    return _INNER.sub("", " ".join(head.split()))[:300] or otherwise
