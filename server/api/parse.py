"""`GenerateRequest` → values the engine may rely on, or the reason why not.

Nothing here blocks, allocates by a number the caller chose, or changes a number silently: a field is inside its
documented range or the call is refused. What needs the tokenizer or the hub is left to `admission.py`.
"""

from __future__ import annotations

import itertools
import math
import secrets
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hub.refs import AdapterRef
from protos.loraplex.v1 import inference_pb2 as wire
from server.config import RequestLimits
from server.engine.request import Sampling, Stopping, Structure
from server.errors import ContextExceeded, InvalidRequest, PromptEmpty, StructureInvalid

MAX_REQUEST_ID_CHARS = 128
MAX_ROUTING_KEY_CHARS = 256
MAX_TENANT_CHARS = 128
ROLES = frozenset({"system", "user", "assistant"})
# Outside these bounds float32 arithmetic on logits overflows or divides by zero.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-5, 100.0
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MAX_WEIGHT = 3.4e38
# "auto" and "auto:NAME" ask for a router, on every server, whatever the hub holds; "auto@3" is the hub's.
AUTO = "auto"


@dataclass(frozen=True)
class TextPrompt:
    """Text continued as it is; not empty."""

    text: str


@dataclass(frozen=True)
class ChatPrompt:
    """Messages for the base's chat template; at least one, as ("role", "content")."""

    messages: tuple[tuple[str, str], ...]

    @property
    def chars(self) -> int:
        """Length of all contents together."""
        return sum(len(content) for _, content in self.messages)


@dataclass(frozen=True)
class TokenPrompt:
    """Token ids used as they are; at least one, all inside the vocabulary."""

    ids: tuple[int, ...]


Prompt = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True)
class AskedAdapter:
    """An adapter as the caller named it; the weight is finite."""

    ref: AdapterRef
    weight: float


@dataclass(frozen=True)
class AskedRouter:
    """A router that is to choose the adapter."""

    name: str  # "" for the only one
    weight: float  # of what it chooses


@dataclass(frozen=True)
class ParsedRequest:
    """A `GenerateRequest` whose every field was checked."""

    id: str  # the caller's, or drawn here
    prompt: Prompt
    adapters: tuple[AskedAdapter, ...]  # none where a router is asked
    router: AskedRouter | None
    sampling: Sampling
    stopping: Stopping
    logprobs: int | None
    structure: Structure | None  # its size is bounded; compiling it is left to admission
    samples: int  # answers to draw, >= 1
    routing_key: str | None  # picks from split aliases


@dataclass(frozen=True)
class RequestParser:
    """Checks messages against the model's sizes and the server's limits."""

    limits: RequestLimits
    max_adapters: int
    vocabulary_size: int
    context_tokens: int
    longest_token: int | None = None  # characters that a token can stand for at most, where that is known

    def generate(self, message: wire.GenerateRequest) -> ParsedRequest:
        """The parsed request.

        Raises `PromptEmpty`, `ContextExceeded` or another `InvalidRequest` naming the field and its range, and the
        hub's `RefInvalid`.
        """
        stopping = self._stopping(message)
        adapters, router = self._adapters(message.adapters)
        return ParsedRequest(
            id=_request_id(message.request_id),
            prompt=self.prompt(message),
            adapters=adapters,
            router=router,
            sampling=self._sampling(message.sampling),
            stopping=stopping,
            logprobs=self._logprobs(message),
            structure=self._structure(message),
            samples=self._samples(message),
            routing_key=_routing_key(message),
        )

    def prompt(self, message: wire.GenerateRequest | wire.TokenizeRequest) -> Prompt:
        """The prompt of either message.

        Raises `PromptEmpty` when unset or empty, and `ContextExceeded` when its length alone shows that it cannot fit:
        to tokenize megabytes takes seconds.
        """
        match message.WhichOneof("prompt"):
            case "text" if message.text:
                self._check_chars(len(message.text))
                return TextPrompt(message.text)
            case "chat" if message.chat.messages:
                return self._chat(message.chat)
            case "token_ids" if isinstance(message, wire.GenerateRequest) and message.token_ids.ids:
                # The length first: ids past the context would be copied for nothing.
                self.check_fits(len(message.token_ids.ids), 1)
                ids = tuple(message.token_ids.ids)
                self._check_token_ids("token_ids", ids)
                return TokenPrompt(ids)
            case None:
                raise PromptEmpty("prompt is not set: give text, chat or token_ids")
            case field:
                raise PromptEmpty(f"prompt.{field} is empty")

    def check_fits(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Raise `ContextExceeded` unless prompt and answer fit the model's context together."""
        if prompt_tokens + max_new_tokens > self.context_tokens:
            raise ContextExceeded(
                f"{prompt_tokens} prompt tokens + max_new_tokens {max_new_tokens} "
                f"exceed the context of {self.context_tokens} tokens"
            )

    def _check_chars(self, chars: int) -> None:
        if self.longest_token is not None and chars > self.context_tokens * self.longest_token:
            raise ContextExceeded(
                f"{chars} characters are at least {-(-chars // self.longest_token)} tokens, which exceed the context "
                f"of {self.context_tokens} tokens"
            )

    def _chat(self, chat: wire.Chat) -> ChatPrompt:
        # Every message costs at least one token, so more of them than that never fit.
        if len(chat.messages) > self.context_tokens:
            raise ContextExceeded(
                f"{len(chat.messages)} chat messages exceed the context of {self.context_tokens} tokens"
            )
        for index, chat_message in enumerate(chat.messages):
            if chat_message.role not in ROLES:
                raise InvalidRequest(f"chat.messages[{index}].role must be one of assistant, system, user")
        prompt = ChatPrompt(tuple((each.role, each.content) for each in chat.messages))
        self._check_chars(prompt.chars)
        return prompt

    def _adapters(self, asked: Sequence[wire.AdapterSelection]) -> tuple[tuple[AskedAdapter, ...], AskedRouter | None]:
        if len(asked) > self.max_adapters:
            raise InvalidRequest(f"{len(asked)} adapters; a request may name at most {self.max_adapters}")
        adapters = []
        for index, each in enumerate(asked):
            weight = each.weight if each.HasField("weight") else 1.0
            _check_range(f"adapters[{index}].weight", weight, -MAX_WEIGHT, MAX_WEIGHT, "a finite number")
            ref = AdapterRef.parse(each.ref)
            name, _, router = each.ref.partition(":")
            if name != AUTO:
                adapters.append(AskedAdapter(ref, weight))
            elif len(asked) == 1:
                return (), AskedRouter(router, weight)
            else:
                raise InvalidRequest(f"adapters[{index}]: {AUTO} stands alone; what the router chooses has no company")
        return tuple(adapters), None

    def _stopping(self, message: wire.GenerateRequest) -> Stopping:
        limits = self.limits
        asked = message.HasField("max_new_tokens")
        max_new_tokens = message.max_new_tokens if asked else limits.default_max_new_tokens
        if max_new_tokens < 1:
            raise InvalidRequest("max_new_tokens must be at least 1")
        self.check_fits(1, max_new_tokens)
        if message.min_new_tokens > max_new_tokens:
            raise InvalidRequest(f"min_new_tokens {message.min_new_tokens} is above max_new_tokens {max_new_tokens}")
        if len(message.stop_strings) > limits.max_stop_strings:
            raise InvalidRequest(
                f"{len(message.stop_strings)} stop_strings; at most {limits.max_stop_strings} are allowed"
            )
        for index, string in enumerate(message.stop_strings):
            if not 1 <= len(string) <= limits.max_stop_string_chars:
                raise InvalidRequest(f"stop_strings[{index}] must have 1 to {limits.max_stop_string_chars} characters")
        if len(message.stop_token_ids) > limits.max_stop_token_ids:
            raise InvalidRequest(
                f"{len(message.stop_token_ids)} stop_token_ids; at most {limits.max_stop_token_ids} are allowed"
            )
        self._check_token_ids("stop_token_ids", message.stop_token_ids)
        return Stopping(
            max_new_tokens=max_new_tokens,
            min_new_tokens=message.min_new_tokens,
            ignore_eos=message.ignore_eos,
            stop_strings=tuple(message.stop_strings),
            stop_token_ids=tuple(message.stop_token_ids),
        )

    def _sampling(self, message: wire.Sampling) -> Sampling:
        temperature = message.temperature
        if temperature != 0:
            _check_range(
                "temperature",
                temperature,
                MIN_TEMPERATURE,
                MAX_TEMPERATURE,
                f"0 (greedy) or from {MIN_TEMPERATURE:.5f} to {MAX_TEMPERATURE:g}",
            )
        top_p = message.top_p if message.HasField("top_p") else 1.0
        if not 0 < top_p <= 1:
            raise InvalidRequest(f"top_p must be above 0 and at most 1, not {top_p:g}")
        if not 0 <= message.min_p < 1:
            raise InvalidRequest(f"min_p must be at least 0 and below 1, not {message.min_p:g}")
        repetition = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
        _check_range(
            "repetition_penalty",
            repetition,
            MIN_REPETITION_PENALTY,
            MAX_REPETITION_PENALTY,
            f"from {MIN_REPETITION_PENALTY:g} to {MAX_REPETITION_PENALTY:g}",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _check_range(name, getattr(message, name), -2.0, 2.0, "from -2 to 2")
        return Sampling(
            temperature=temperature,
            top_p=top_p,
            # To keep as many tokens as there are, or more, is to keep all.
            top_k=message.top_k if message.top_k < self.vocabulary_size else 0,
            min_p=message.min_p,
            seed=message.seed if message.HasField("seed") else secrets.randbits(63),
            repetition_penalty=repetition,
            presence_penalty=message.presence_penalty,
            frequency_penalty=message.frequency_penalty,
            logit_bias=self._logit_bias(message),
        )

    def _logit_bias(self, message: wire.Sampling) -> tuple[tuple[int, float], ...]:
        if len(message.logit_bias) > self.limits.max_logit_bias:
            raise InvalidRequest(
                f"{len(message.logit_bias)} entries in logit_bias; at most {self.limits.max_logit_bias} are allowed"
            )
        bias = tuple(sorted(message.logit_bias.items()))
        self._check_token_ids("logit_bias", [token_id for token_id, _ in bias])
        for token_id, value in bias:
            _check_range(f"logit_bias[{token_id}]", value, -100.0, 100.0, "from -100 to 100")
        return bias

    def _logprobs(self, message: wire.GenerateRequest) -> int | None:
        if not message.HasField("logprobs"):
            return None
        if message.logprobs > self.limits.max_logprobs:
            raise InvalidRequest(f"logprobs must be from 0 to {self.limits.max_logprobs}, not {message.logprobs}")
        return message.logprobs

    def _structure(self, message: wire.GenerateRequest) -> Structure | None:
        limit = self.limits.max_structure_chars
        match message.WhichOneof("structured"):
            case None:
                return None
            case "choice":
                texts = tuple(message.choice.texts)
                if len(texts) > self.limits.max_choices:
                    raise StructureInvalid(f"choice: {len(texts)} texts; at most {self.limits.max_choices} are allowed")
                structure, size = Structure("choice", choices=texts), sum(map(len, texts))
            case "json_schema" | "regex" | "grammar" as kind:
                structure = Structure(kind, getattr(message, kind))
                size = len(structure.text)
        if not size:
            raise StructureInvalid(f"{structure.kind} is empty")
        if size > limit:
            raise StructureInvalid(f"{structure.kind} has {size} characters; at most {limit} are allowed")
        return structure

    def _samples(self, message: wire.GenerateRequest) -> int:
        samples = message.n if message.HasField("n") else 1
        if not 1 <= samples <= self.limits.max_samples:
            raise InvalidRequest(f"n must be from 1 to {self.limits.max_samples}, not {samples}")
        return samples

    def _check_token_ids(self, field: str, ids: Sequence[int]) -> None:
        for token_id in ids:
            if token_id >= self.vocabulary_size:
                raise InvalidRequest(
                    f"{field}: token id {token_id} is outside the vocabulary of {self.vocabulary_size}"
                )


def _request_id(text: str) -> str:
    if not text:
        return uuid.uuid4().hex
    if len(text) > MAX_REQUEST_ID_CHARS or not all("\x20" <= char <= "\x7e" for char in itertools.islice(text, 129)):
        raise InvalidRequest(f"request_id must be at most {MAX_REQUEST_ID_CHARS} printable ASCII characters")
    return text


def _routing_key(message: wire.GenerateRequest) -> str | None:
    if not message.HasField("routing_key"):
        return None
    if not 0 < len(message.routing_key) <= MAX_ROUTING_KEY_CHARS:
        raise InvalidRequest(f"routing_key must have 1 to {MAX_ROUTING_KEY_CHARS} characters, or be left out")
    return message.routing_key


def tenant_of(metadata: Iterable[tuple[str, str | bytes]], key: str | None) -> str:
    """The tenant whose share of the server a call uses; "" where it names none, or none is asked for.

    Raises `InvalidRequest` for a name that is too long or not of printable ASCII, and for two different ones.
    """
    if key is None:
        return ""
    names = {value for name, value in metadata if name == key}
    if len(names) > 1:
        raise InvalidRequest(f"{key} names more than one tenant")
    for name in names:
        printable = isinstance(name, str) and all("\x20" <= char <= "\x7e" for char in name)
        if not printable or not 0 < len(name) <= MAX_TENANT_CHARS:
            raise InvalidRequest(f"{key} must have 1 to {MAX_TENANT_CHARS} printable ASCII characters")
        return str(name)
    return ""


def _check_range(field: str, value: float, low: float, high: float, range_words: str) -> None:
    """Refuse NaN, infinities and values outside [low, high]."""
    if not (math.isfinite(value) and low <= value <= high):
        raise InvalidRequest(f"{field} must be {range_words}, not {value:g}")
