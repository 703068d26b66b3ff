"""What the client's calls take, and how it travels: plain Python into messages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from numbers import Real
from typing import Any, TypedDict, TypeGuard

from protos.loraplex.v1 import inference_pb2

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""Text to continue, or chat messages `{"role": …, "content": …}`, or token ids."""

Adapters = str | tuple[str, float] | Sequence[str | tuple[str, float]] | Mapping[str, float] | None
"""One ref, or several, each alone or with its weight, or a mapping of refs to weights; None: the base; "auto": what the
server's router chooses."""


# Options that are fields of the same name, of `Sampling` and of `GenerateRequest`.
_SAMPLING = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
}
_PLAIN = {"request_id", "max_new_tokens", "min_new_tokens", "ignore_eos", "logprobs", "n", "routing_key"}


class Options(TypedDict, total=False):
    """What `generate` and `stream` take beside prompt and adapters; None, as what is left out: the server's default."""

    max_new_tokens: int | None
    min_new_tokens: int | None
    temperature: float | None  # 0, the default, is greedy
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    logprobs: int | None  # n: the log-probability of every token and of the n best at its place
    n: int | None  # answers to draw; all of them are in `Answer.candidates`
    routing_key: str | None  # picks from split aliases: the same key gets the same version
    json_schema: Mapping[str, Any] | str | None  # of these four one at most: what the whole answer must be
    regex: str | None
    grammar: str | None  # llguidance's dialect of Lark
    choice: Sequence[str] | None
    request_id: str | None
    timeout: float | None  # seconds; the server gives up too


def generate_request(prompt: Prompt, adapters: Adapters, options: Options) -> inference_pb2.GenerateRequest:
    """The message of a call; raises ValueError or TypeError for values no message can hold."""
    for unknown in options.keys() - Options.__annotations__.keys():
        near = get_close_matches(unknown, Options.__annotations__, n=1)
        raise TypeError(f"there is no option {unknown!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if isinstance(given.get("stop"), str):
        raise TypeError("stop takes a list of texts")
    message = inference_pb2.GenerateRequest(adapters=_selections(adapters))
    for holder, names in ((message.sampling, _SAMPLING), (message, _PLAIN)):
        for name in names & given.keys():
            with _naming(name):
                setattr(holder, name, given[name])
    for name, field in (("stop", message.stop_strings), ("stop_token_ids", message.stop_token_ids)):
        with _naming(name):
            field.extend(given.get(name, ()))
    with _naming("logit_bias"):
        message.sampling.logit_bias.update(given.get("logit_bias", {}))
    _set_structure(message, given)
    _check_prompt(prompt)
    if isinstance(prompt, str):
        message.text = prompt
    elif len(prompt) and not isinstance(prompt[0], Mapping):
        with _naming("a prompt of token ids"):
            message.token_ids.ids.extend(prompt)  # type: ignore[arg-type]
    else:
        message.chat.messages.extend(_chat(prompt))  # type: ignore[arg-type]
    return message


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Say whose value it is that no message can hold."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what}: {error}") from None


def _set_structure(message: inference_pb2.GenerateRequest, given: Mapping[str, Any]) -> None:
    names = [name for name in ("json_schema", "regex", "grammar", "choice") if name in given]
    if len(names) > 1:
        raise ValueError(f"an answer has one structure at most, not {' and '.join(names)}")
    for name in names:
        value = given[name]
        with _naming(name):
            if name == "choice":
                if isinstance(value, str):
                    raise TypeError("it takes a list of texts")
                message.choice.texts.extend(value)
                message.choice.SetInParent()
            elif name == "json_schema" and not isinstance(value, str):
                message.json_schema = json.dumps(value)
            else:
                setattr(message, name, value)


def _check_prompt(prompt: object) -> None:
    """Refuse what is no prompt, or would pass for a list of token ids or messages."""
    listed = hasattr(prompt, "__len__") and hasattr(prompt, "__getitem__")  # arrays and tensors too
    if not listed or isinstance(prompt, bytes | bytearray | memoryview | Mapping):
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
    return [_chat_message(f"chat message {index}", each) for index, each in enumerate(messages)]


def _chat_message(name: str, message: object) -> inference_pb2.ChatMessage:
    if not isinstance(message, Mapping):
        raise TypeError(f'{name} must be {{"role": …, "content": …}}, not {type(message).__name__}')
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"{name} has no {key!r}")
        if not isinstance(message[key], str):  # a message would take None for no text
            raise TypeError(f"{name}: its {key} must be text, not {type(message[key]).__name__}")
    with _naming(name):
        return inference_pb2.ChatMessage(role=message["role"], content=message["content"])
