"""The offline door: a list of requests in, their whole answers out, for evaluation and tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from server.engine.outbox import BlockingOutbox, Outbox
from server.engine.request import Delta, FinishReason, Request
from server.errors import QueueFull


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: Exception | None
    deltas: tuple[Delta, ...]


def run_all(requests: Iterable[Request], submit: Callable[[Request, Outbox], None]) -> list[Completion]:
    """Submit every request, waiting for earlier ones of these where the queue is full; the answers in order.

    Raises what `submit` raises, `QueueFull` included where none of these is inside.
    """
    answers: list[Completion] = []
    queued: list[BlockingOutbox] = []
    for request in requests:
        while True:
            outbox = BlockingOutbox()
            try:
                submit(request, outbox)
                break
            except QueueFull:
                if not queued:
                    raise  # others filled the queue
                answers.append(_completion(queued.pop(0)))
        queued.append(outbox)
    return answers + [_completion(outbox) for outbox in queued]


def _completion(outbox: BlockingOutbox) -> Completion:
    deltas = tuple(outbox)
    last = deltas[-1]
    return Completion(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        finish_reason=last.finish.reason if last.finish else None,
        error=last.error,
        deltas=deltas,
    )
