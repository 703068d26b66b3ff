"""Steps launched before the one in front of them is answered, as on a GPU."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

from server.engine.request import Stopping
from server.errors import Cancelled, NonFiniteLogits
from tests.server.engine.pretend import PAGE_TOKENS, PretendEngine, expected, request


def warm(pretend: PretendEngine, *adapters: str) -> None:
    """The adapters are on the device, nothing was launched ahead."""
    pretend.run(*(request(adapter, new=1) for adapter in adapters))
    assert not pretend.launched


def test_every_step_but_the_first_is_launched_ahead() -> None:
    pretend = PretendEngine(ahead=True)
    asked = [request("a", new=9), request("b", new=9), request(new=9)]
    try:
        warm(pretend, "a", "b")
        before = pretend.counts.steps
        readers = pretend.run(*asked)
        assert [reader.token_ids for reader in readers] == [expected(one) for one in asked]
        assert pretend.counts.steps - before == 9  # one with the prompts, and nothing in vain
        assert [len(step) for step in pretend.launched] == [3] * 7
        pretend.check_empty()
    finally:
        pretend.close()


def test_whom_a_token_ends_has_computed_one_in_vain_and_nobody_else() -> None:
    pretend = PretendEngine(ahead=True)
    other = request("b", new=12)
    try:
        warm(pretend, "a", "b")
        stop = expected(request("a", new=12))[4]
        stopping = Stopping(max_new_tokens=12, ignore_eos=True, stop_token_ids=(stop,))
        asked = dataclasses.replace(request("a"), stopping=stopping)
        ours, theirs = pretend.run(asked, other)
        assert ours.error is None and ours.token_ids[-1] == stop
        assert theirs.token_ids == expected(other)
        in_vain = sum(map(len, pretend.launched)) + 4 - len(ours.token_ids) - len(theirs.token_ids)
        assert 0 < in_vain <= 4  # two prompts, one step that was not foreseen, and the one in vain
        pretend.check_empty()
    finally:
        pretend.close()


def test_who_comes_waits_one_step_longer_and_no_more() -> None:
    pretend = PretendEngine(ahead=True)
    try:
        warm(pretend, "a", "b")
        running = pretend.submit(request("a", new=40))
        for _ in range(3):
            pretend.step()
        assert len(pretend.launched) == 2
        asked = request("b", new=2)
        newcomer = pretend.submit(asked)
        pretend.step()  # launched before they came
        assert pretend.scheduler.running[0].request.adapters[0].digest == "a" and len(pretend.scheduler.running) == 1
        pretend.step()
        assert len(pretend.scheduler.running) == 2
        pretend.finish(newcomer, running)
        assert newcomer.token_ids == expected(asked)
    finally:
        pretend.close()


def test_who_waits_for_a_place_has_every_second_step_scheduled() -> None:
    """All places are taken: whether one is free, or somebody has to give one up, is asked every second step."""
    pretend = PretendEngine(ahead=True, max_sequences=1)
    asked = [request("a", new=20), request("a", new=3)]
    try:
        warm(pretend, "a")
        scheduled = []
        schedule = pretend.scheduler.schedule
        pretend.scheduler.schedule = lambda: (scheduled.append(pretend.counts.steps), schedule())[1]
        readers = pretend.run(*asked)
        assert [reader.token_ids for reader in readers] == [expected(one) for one in asked]
        assert max(after - before for before, after in pairwise(scheduled)) == 2 and pretend.launched
    finally:
        pretend.close()


def test_nobody_gives_pages_up_for_what_is_foreseen() -> None:
    """Two that fill the memory: the step for which there is no page is not foreseen, and ends as it always did."""
    pretend = PretendEngine(ahead=True, pages=6)
    asked = [request("a", new=4 * PAGE_TOKENS), request("b", new=4 * PAGE_TOKENS)]
    plain = PretendEngine(pages=6)
    try:
        warm(pretend, "a", "b")
        plain.run(request("a", new=1), request("b", new=1))
        readers = pretend.run(*asked)
        plain.run(*asked)
        assert [reader.token_ids for reader in readers] == [expected(one) for one in asked]
        assert pretend.counts.preemptions == plain.counts.preemptions > 0
        assert pretend.launched
        pretend.check_empty()
    finally:
        pretend.close()
        plain.close()


def test_cancelled_while_the_next_step_computes() -> None:
    pretend = PretendEngine(ahead=True)
    other = request("b", new=9)
    try:
        warm(pretend, "a", "b")
        asked = request("a", new=30)
        ours, theirs = pretend.submit(asked), pretend.submit(other)
        for _ in range(3):
            pretend.step()
        assert pretend.launched
        pretend.engine.cancel(asked.id)
        pretend.step()
        assert isinstance(ours.error, Cancelled)
        # Its pages are free, and written anew behind the step that still writes one of them.
        third = request("a", prompt=(5, 6, 7, 8, 9), new=3)
        last = pretend.submit(third)
        pretend.finish(theirs, last)
        assert theirs.token_ids == expected(other) and last.token_ids == expected(third)
        pretend.check_empty()
    finally:
        pretend.close()


def test_what_was_launched_for_an_answer_that_is_no_number_is_scrubbed() -> None:
    """The step behind the one that fails wrote NaN as well, into a page that the next one reads."""
    pretend = PretendEngine(ahead=True, pages=8)
    try:
        warm(pretend, "a")
        (poisoned,) = pretend.run(request(PretendEngine.POISON, prompt=(1,), new=9))
        assert isinstance(poisoned.error, NonFiniteLogits) and pretend.launched
        asked = request("a", prompt=tuple(range(20)), new=9)  # takes every page
        (reader,) = pretend.run(asked)
        assert reader.token_ids == expected(asked)
        pretend.check_empty()
    finally:
        pretend.close()
