"""The engine's nouns → messages."""

from __future__ import annotations

from collections.abc import Iterable

from protos.loraplex.v1 import inference_pb2 as wire
from server.engine.request import AdapterUse, Delta, Finish, FinishReason, TokenLogprobs

_FINISH_REASONS = {
    FinishReason.STOP: wire.FINISH_REASON_STOP,
    FinishReason.LENGTH: wire.FINISH_REASON_LENGTH,
    FinishReason.STOP_STRING: wire.FINISH_REASON_STOP_STRING,
}


def first_chunk(request_id: str, adapters: Iterable[AdapterUse]) -> wire.GenerateChunk:
    """Sent before any token: which versions will answer."""
    return wire.GenerateChunk(request_id=request_id, adapters=_resolved(adapters))


def chunk(request_id: str, adapters: Iterable[AdapterUse], delta: Delta) -> wire.GenerateChunk:
    """One piece of a stream; the last one also carries adapters, finish reason, usage and timing."""
    message = wire.GenerateChunk(
        request_id=request_id,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=_logprobs(delta.logprobs),
        warnings=delta.warnings,
    )
    if delta.finish is not None:
        message.adapters.extend(_resolved(adapters))
        _set_finish(message, delta.finish)
    return message


def response(request_id: str, adapters: Iterable[AdapterUse], deltas: Iterable[Delta]) -> wire.GenerateResponse:
    """A whole answer from its deltas, of which the last has `finish`."""
    message = wire.GenerateResponse(request_id=request_id, adapters=_resolved(adapters))
    texts = []
    for delta in deltas:
        texts.append(delta.text)
        message.token_ids.extend(delta.token_ids)
        message.logprobs.extend(_logprobs(delta.logprobs))
        message.warnings.extend(delta.warnings)
        if delta.finish is not None:
            _set_finish(message, delta.finish)
    message.text = "".join(texts)
    return message


def _set_finish(message: wire.GenerateChunk | wire.GenerateResponse, finish: Finish) -> None:
    message.finish_reason = _FINISH_REASONS[finish.reason]
    message.usage.prompt_tokens = finish.usage.prompt_tokens
    message.usage.completion_tokens = finish.usage.completion_tokens
    message.timing.queue_seconds = finish.timing.queue
    message.timing.time_to_first_token_seconds = finish.timing.first_token
    message.timing.total_seconds = finish.timing.total


def _resolved(adapters: Iterable[AdapterUse]) -> list[wire.ResolvedAdapter]:
    return [wire.ResolvedAdapter(version=use.version, digest=use.digest, weight=use.weight) for use in adapters]


def _logprobs(positions: Iterable[TokenLogprobs]) -> list[wire.PositionLogprobs]:
    return [
        wire.PositionLogprobs(
            chosen=wire.TokenLogprob(token_id=position.token_id, logprob=position.logprob),
            top=[wire.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in position.top],
        )
        for position in positions
    ]
