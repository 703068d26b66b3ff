"""The engine's nouns → messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from protos.loraplex.v1 import inference_pb2 as wire
from server.api.routing import Routed
from server.engine.request import AdapterUse, Delta, Finish, FinishReason, TokenLogprobs

_FINISH_REASONS = {
    FinishReason.STOP: wire.FINISH_REASON_STOP,
    FinishReason.LENGTH: wire.FINISH_REASON_LENGTH,
    FinishReason.STOP_STRING: wire.FINISH_REASON_STOP_STRING,
}


def first_chunk(request_id: str, adapters: Iterable[AdapterUse], routed: Routed | None = None) -> wire.GenerateChunk:
    """Sent before any token: which versions will answer, and how they were chosen."""
    return wire.GenerateChunk(
        request_id=request_id, adapters=_resolved(adapters), routing=None if routed is None else _routing(routed)
    )


def chunk(
    request_id: str, adapters: Iterable[AdapterUse], delta: Delta, index: int = 0, routed: Routed | None = None
) -> wire.GenerateChunk:
    """One piece of a stream; a candidate's last one also carries adapters, routing, finish reason, usage and timing."""
    message = wire.GenerateChunk(
        request_id=request_id,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=_logprobs(delta.logprobs),
        # Every candidate has the same ones.
        warnings=() if index else delta.warnings,
        index=index,
    )
    if delta.finish is not None:
        message.adapters.extend(_resolved(adapters))
        if routed is not None:
            message.routing.CopyFrom(_routing(routed))
        _set_finish(message, delta.finish)
    return message


def response(
    request_id: str,
    adapters: Iterable[AdapterUse],
    candidates: Sequence[Iterable[Delta]],
    routed: Routed | None = None,
) -> wire.GenerateResponse:
    """A whole answer from each candidate's deltas, of which the last has `finish`; candidate 0 comes first."""
    message = wire.GenerateResponse(
        request_id=request_id, adapters=_resolved(adapters), routing=None if routed is None else _routing(routed)
    )
    completion_tokens = 0
    for index, deltas in enumerate(candidates):
        if index:
            finish = _fill(message.candidates.add(index=index), deltas)[1]
        else:
            warnings, finish = _fill(message, deltas)
            message.warnings.extend(warnings)
        if finish is not None:
            message.usage.prompt_tokens = finish.usage.prompt_tokens
            completion_tokens += finish.usage.completion_tokens
    message.usage.completion_tokens = completion_tokens
    if len(candidates) > 1:
        first = wire.Candidate(text=message.text, token_ids=message.token_ids, logprobs=message.logprobs)
        first.finish_reason = message.finish_reason
        first.timing.CopyFrom(message.timing)
        message.candidates.insert(0, first)
    return message


def _fill(message: wire.GenerateResponse | wire.Candidate, deltas: Iterable[Delta]) -> tuple[list[str], Finish | None]:
    """Put one candidate's deltas together; returns its warnings and its end."""
    texts, warnings, finish = [], [], None
    for delta in deltas:
        texts.append(delta.text)
        message.token_ids.extend(delta.token_ids)
        message.logprobs.extend(_logprobs(delta.logprobs))
        warnings += delta.warnings
        finish = delta.finish
    message.text = "".join(texts)
    if finish is not None:
        _set_end(message, finish)
    return warnings, finish


def _set_finish(message: wire.GenerateChunk, finish: Finish) -> None:
    _set_end(message, finish)
    message.usage.prompt_tokens = finish.usage.prompt_tokens
    message.usage.completion_tokens = finish.usage.completion_tokens


def _set_end(message: wire.GenerateChunk | wire.GenerateResponse | wire.Candidate, finish: Finish) -> None:
    message.finish_reason = _FINISH_REASONS[finish.reason]
    message.timing.queue_seconds = finish.timing.queue
    message.timing.time_to_first_token_seconds = finish.timing.first_token
    message.timing.total_seconds = finish.timing.total


def _resolved(adapters: Iterable[AdapterUse]) -> list[wire.ResolvedAdapter]:
    return [wire.ResolvedAdapter(version=use.version, digest=use.digest, weight=use.weight) for use in adapters]


def _routing(routed: Routed) -> wire.Routing:
    choice = routed.choice
    return wire.Routing(
        router=routed.router,
        chosen=choice.adapter or "",
        nearest=choice.nearest,
        distance=choice.distance,
        threshold=choice.threshold,
    )


def _logprobs(positions: Iterable[TokenLogprobs]) -> list[wire.PositionLogprobs]:
    return [
        wire.PositionLogprobs(
            chosen=wire.TokenLogprob(token_id=position.token_id, logprob=position.logprob),
            top=[wire.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in position.top],
        )
        for position in positions
    ]
