"""What the client's calls return: plain Python out of messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from protos.loraplex.v1 import adapters_pb2, inference_pb2
from server.client_routing import Routing, chosen_by

if TYPE_CHECKING:
    import grpc

FinishReason = Literal["stop", "length", "stop_string"]

_REASON_KEY = "loraplex-reason"


class GenerationError(Exception):
    """A call that the server refused or that did not reach it."""

    def __init__(self, status: str, reason: str, message: str) -> None:
        """`status`: gRPC's name, "NOT_FOUND"; `reason`: stable, to match on, "ADAPTER_NOT_FOUND"."""
        super().__init__(message)
        self.add_note(f"status {status}, reason {reason}")
        self.status = status
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[GenerationError], tuple[str, str, str]]:
        """Made anew from its three parts: worker processes hand their errors on by pickle."""
        return type(self), (self.status, self.reason, self.message)


@dataclass(frozen=True)
class AnsweringAdapter:
    """A version that answered."""

    version: str  # "team/sentiment@3"
    digest: str  # "sha256:…"
    weight: float


@dataclass(frozen=True)
class Logprobs:
    """Natural log-probabilities at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # best first


@dataclass(frozen=True)
class Timing:
    """Seconds on the server since it received the request."""

    queue: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Chunk:
    """What is new of an answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    index: int = 0  # the candidate it belongs to, for n > 1


@dataclass(frozen=True)
class Candidate:
    """One of the answers to a request."""

    index: int
    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    timing: Timing


@dataclass(frozen=True)
class Answer:
    """A whole answer; with n > 1, text, tokens and timing are candidate 0's and completion_tokens everybody's."""

    text: str
    adapters: tuple[AnsweringAdapter, ...]  # empty: the base answered
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    timing: Timing
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprobs, ...]
    warnings: tuple[str, ...]
    request_id: str
    candidates: tuple[Candidate, ...]  # all n, the first included
    routing: Routing | None = None  # None: no router was asked

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed of `text`, the first token's wait not counted; 0 for answers of one token."""
        seconds, tokens = self.timing.total - self.timing.first_token, len(self.token_ids)
        return (tokens - 1) / seconds if tokens > 1 and seconds > 0 else 0.0


@dataclass(frozen=True)
class ModelInfo:
    """What a server serves and the limits of a request."""

    base: str
    revision: str
    fingerprint: str
    architecture: str
    quantization: str
    dtype: str
    vocabulary_size: int
    context_tokens: int
    default_max_new_tokens: int
    max_logprobs: int
    max_adapter_rank: int
    max_adapters_per_request: int
    server_version: str


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    id: int
    text: str


@dataclass(frozen=True)
class HeldAdapter:
    """An adapter the server holds."""

    version: str
    digest: str
    tier: Literal["loading", "host", "device"]
    rank: int
    host_bytes: int
    device_bytes: int
    requests_in_flight: int
    draining: bool


class AnswerSoFar:
    """Joins a stream's chunks into an answer."""

    def __init__(self, candidates: int = 1) -> None:
        self._whole = inference_pb2.GenerateResponse()
        self._parts = [inference_pb2.Candidate(index=index) for index in range(candidates)]
        self._texts: list[list[str]] = [[] for _ in self._parts]
        self._unfinished = candidates
        self.answer: Answer | None = None  # set by the last chunk

    @property
    def adapters(self) -> tuple[AnsweringAdapter, ...]:
        """The versions that answer, known from the first chunk on."""
        return _answering(self._whole.adapters)

    @property
    def routing(self) -> Routing | None:
        """How they were chosen, known from the first chunk on; None where no router was asked."""
        return chosen_by(self._whole)

    def add(self, message: inference_pb2.GenerateChunk) -> Chunk:
        """Take one chunk in and return it for the caller."""
        whole = self._whole
        whole.request_id = message.request_id
        if message.adapters:
            del whole.adapters[:]
            whole.adapters.extend(message.adapters)
        if message.HasField("routing"):
            whole.routing.CopyFrom(message.routing)
        part = self._parts[message.index]
        self._texts[message.index].append(message.text)
        part.token_ids.extend(message.token_ids)
        part.logprobs.extend(message.logprobs)
        whole.warnings.extend(message.warnings)
        if message.finish_reason:
            part.finish_reason = message.finish_reason
            part.timing.CopyFrom(message.timing)
            part.text = "".join(self._texts[message.index])
            whole.usage.prompt_tokens = message.usage.prompt_tokens
            whole.usage.completion_tokens += message.usage.completion_tokens
            self._unfinished -= 1
            if not self._unfinished:
                self.answer = self._join()
        return Chunk(message.text, tuple(message.token_ids), _logprobs(message.logprobs), message.index)

    def _join(self) -> Answer:
        whole, first = self._whole, self._parts[0]
        whole.text, whole.finish_reason = first.text, first.finish_reason
        whole.token_ids.extend(first.token_ids)
        whole.logprobs.extend(first.logprobs)
        whole.timing.CopyFrom(first.timing)
        if len(self._parts) > 1:
            whole.candidates.extend(self._parts)
        return answer(whole)


def answer(message: inference_pb2.GenerateResponse) -> Answer:
    """The answer a message holds."""
    first = _candidate(message)
    return Answer(
        text=first.text,
        adapters=_answering(message.adapters),
        finish_reason=first.finish_reason,
        prompt_tokens=message.usage.prompt_tokens,
        completion_tokens=message.usage.completion_tokens,
        timing=first.timing,
        token_ids=first.token_ids,
        logprobs=first.logprobs,
        warnings=tuple(message.warnings),
        request_id=message.request_id,
        candidates=tuple(_candidate(each, each.index) for each in message.candidates) or (first,),
        routing=chosen_by(message),
    )


def _candidate(message: inference_pb2.GenerateResponse | inference_pb2.Candidate, index: int = 0) -> Candidate:
    reason = inference_pb2.FinishReason.Name(message.finish_reason).removeprefix("FINISH_REASON_").lower()
    timing = message.timing
    return Candidate(
        index=index,
        text=message.text,
        finish_reason=reason,  # type: ignore[arg-type]
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        timing=Timing(timing.queue_seconds, timing.time_to_first_token_seconds, timing.total_seconds),
    )


def model_info(message: inference_pb2.ModelInfo) -> ModelInfo:
    """What a message says of the server."""
    return ModelInfo(**{field: getattr(message, field) for field in ModelInfo.__dataclass_fields__})


def held_adapter(message: adapters_pb2.AdapterStatus) -> HeldAdapter:
    """The adapter a message describes."""
    fields = {field: getattr(message, field) for field in HeldAdapter.__dataclass_fields__ if field != "tier"}
    tier = adapters_pb2.Tier.Name(message.tier).removeprefix("TIER_").lower()
    return HeldAdapter(tier=tier, **fields)  # type: ignore[arg-type]


def error(raised: grpc.RpcError, address: str) -> GenerationError:
    """What a failed call means to its caller."""
    # Both kinds of channel raise errors that are calls too; the stubs know that of one.
    call: Any = raised
    status: str = call.code().name
    message: str = call.details() or ""
    reason = dict(call.trailing_metadata() or ()).get(_REASON_KEY)
    if reason is None:
        # Not said by a handler of ours: gRPC itself, or no server at all.
        reason = status
        if status == "UNAVAILABLE":
            message = _away(message, address)
        elif status == "DEADLINE_EXCEEDED":
            message = "the answer was not complete within the timeout"
        elif status == "CANCELLED":
            return cancelled()
    return GenerationError(status, str(reason), message)


def _away(words: str, address: str) -> str:
    """What gRPC's `words` say of a connection that was not made ("failed to connect to all addresses", "DNS resolution
    failed", "errors resolving …") or did not last ("Socket closed", "Stream removed (…)")."""
    if "connect to" in words or "resol" in words:
        return f"no server answers at {address} (start one with `hub serve`)"
    return f"the connection to the server at {address} broke before the answer was complete"


def cancelled() -> GenerationError:
    """What a stream raises that its caller cancelled."""
    return GenerationError("CANCELLED", "CANCELLED", "the stream was cancelled")


def _answering(messages: Iterable[inference_pb2.ResolvedAdapter]) -> tuple[AnsweringAdapter, ...]:
    return tuple(AnsweringAdapter(each.version, each.digest, each.weight) for each in messages)


def _logprobs(messages: Iterable[inference_pb2.PositionLogprobs]) -> tuple[Logprobs, ...]:
    return tuple(
        Logprobs(each.chosen.token_id, each.chosen.logprob, tuple((top.token_id, top.logprob) for top in each.top))
        for each in messages
    )
