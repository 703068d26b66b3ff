"""What the client's calls take, and how it travels: plain Python into messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any, TypedDict, TypeGuard

from protos.loraplex.v1 import inference_pb2

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""Text to continue, or chat messages `{"role": …, "content": …}`, or token ids."""

Adapters = str | tuple[str, float] | Sequence[str | tuple[str, float]] | Mapping[str, float] | None
"""One ref, or several, each alone or with its weight, or a mapping of refs to weights; None: the base; "auto": what the
server's router chooses."""


class Options(TypedDict, total=False):
    """What `generate` and `stream` take beside prompt and adapters; what is left out has the server's default."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float  # 0, the default, is greedy
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int  # n: the log-probability of every token and of the n best at its place
    n: int  # answers to draw; all of them are in `Answer.candidates`
    routing_key: str  # picks from split aliases: the same key gets the same version
    json_schema: Mapping[str, Any] | str  # of these four one at most: what the whole answer must be
    regex: str
    grammar: str  # llguidance's dialect of Lark
    choice: Sequence[str]
    request_id: str
    timeout: float  # seconds; the server gives up too


def generate_request(prompt: Prompt, adapters: Adapters, options: Options) -> inference_pb2.GenerateRequest:
    """The message of a call; raises ValueError or TypeError for values no message can hold."""
    for unknown in options.keys() - Options.__annotations__.keys():
        near = get_close_matches(unknown, Options.__annotations__, n=1)
        raise TypeError(f"there is no option {unknown!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if isinstance(options.get("stop"), str):
        raise TypeError("stop takes a list of texts")
    sampling = inference_pb2.Sampling()
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        if name in options:
            setattr(sampling, name, options[name])
    sampling.logit_bias.update(options.get("logit_bias", {}))
    message = inference_pb2.GenerateRequest(
        request_id=options.get("request_id", ""),
        adapters=_selections(adapters),
        sampling=sampling,
        min_new_tokens=options.get("min_new_tokens", 0),
        ignore_eos=options.get("ignore_eos", False),
        stop_strings=options.get("stop", ()),
        stop_token_ids=options.get("stop_token_ids", ()),
    )
    if "max_new_tokens" in options:
        message.max_new_tokens = options["max_new_tokens"]
    if "logprobs" in options:
        message.logprobs = options["logprobs"]
    if "routing_key" in options:
        message.routing_key = options["routing_key"]
    if "n" in options:
        message.n = options["n"]
    _set_structure(message, options)
    _check_prompt(prompt)
    if isinstance(prompt, str):
        message.text = prompt
    elif prompt and not isinstance(prompt[0], Mapping):
        message.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
    else:
        message.chat.messages.extend(_chat(prompt))  # type: ignore[arg-type]
    return message


def _set_structure(message: inference_pb2.GenerateRequest, options: Options) -> None:
    given = [name for name in ("json_schema", "regex", "grammar", "choice") if name in options]
    if len(given) > 1:
        raise ValueError(f"an answer has one structure at most, not {' and '.join(given)}")
    if "json_schema" in options:
        schema = options["json_schema"]
        message.json_schema = schema if isinstance(schema, str) else json.dumps(schema)
    elif "choice" in options:
        if isinstance(options["choice"], str):
            raise TypeError("choice takes a list of texts")
        message.choice.texts.extend(options["choice"])
        message.choice.SetInParent()
    elif "regex" in options:
        message.regex = options["regex"]
    elif "grammar" in options:
        message.grammar = options["grammar"]


def _check_prompt(prompt: object) -> None:
    """Refuse what would pass for a list of token ids or messages."""
    if isinstance(prompt, bytes | bytearray | memoryview | Mapping):
        kinds = "text, a list of chat messages or a list of token ids"
        raise TypeError(f"a prompt is {kinds}, not {type(prompt).__name__}")


def tokenize_request(prompt: str | Sequence[Mapping[str, str]]) -> inference_pb2.TokenizeRequest:
    """The message of a call."""
    _check_prompt(prompt)
    if isinstance(prompt, str):
        return inference_pb2.TokenizeRequest(text=prompt)
    return inference_pb2.TokenizeRequest(chat=inference_pb2.Chat(messages=_chat(prompt)))


def _selections(adapters: Adapters) -> list[inference_pb2.AdapterSelection]:
    if adapters is None:
        return []
    if isinstance(adapters, Mapping):
        adapters = list(adapters.items())
    elif isinstance(adapters, str) or _is_weighted(adapters):
        adapters = [adapters]  # type: ignore[list-item]
    return [_selection(each) for each in adapters]


def _selection(adapter: object) -> inference_pb2.AdapterSelection:
    if isinstance(adapter, str):
        return inference_pb2.AdapterSelection(ref=adapter)
    if not _is_weighted(adapter):
        raise TypeError(f"an adapter is a ref, or a ref and its weight, not {adapter!r}")
    ref, weight = adapter
    return inference_pb2.AdapterSelection(ref=ref, weight=weight)


def _is_weighted(adapter: object) -> TypeGuard[Sequence[Any]]:
    """Whether it is a ref with its weight."""
    match adapter:
        case [str(), Real()]:
            return True
        case _:
            return False


def _chat(messages: Iterable[Mapping[str, str]]) -> list[inference_pb2.ChatMessage]:
    return [inference_pb2.ChatMessage(role=each["role"], content=each["content"]) for each in messages]
