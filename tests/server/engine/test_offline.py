"""The offline door waits for its own answers where the queue is full, and says so where it has none to wait for."""

from typing import Any

import pytest

from server.engine.offline import run_all
from server.engine.outbox import Outbox
from server.engine.request import Delta, Finish, FinishReason, Request, Timing, Usage
from server.errors import QueueFull
from tests.server.engine.pretend import request

END = Finish(FinishReason.LENGTH, Usage(1, 1), Timing(0.0, 0.0, 0.0))


def test_more_requests_than_may_wait_are_answered_in_order() -> None:
    inside: list[Outbox] = []
    asked = [request() for _ in range(9)]

    def submit(one: Request, outbox: Outbox) -> None:
        if len(inside) == 2:
            for waiting in inside:
                waiting.put(Delta(finish=END))
            inside.clear()
            raise QueueFull("2 requests wait already")
        outbox.put(Delta(text=one.id, token_ids=[7]))
        inside.append(outbox)
        if one is asked[-1]:
            outbox.put(Delta(finish=END))

    answers = run_all(asked, submit)
    assert [answer.text for answer in answers] == [one.id for one in asked]
    assert all(answer.finish_reason is FinishReason.LENGTH and answer.token_ids == (7,) for answer in answers)


def test_a_queue_filled_by_others_is_no_reason_to_fail_oddly() -> None:
    def submit(*_: Any) -> None:
        raise QueueFull("256 requests wait already")

    with pytest.raises(QueueFull):
        run_all([request()], submit)
