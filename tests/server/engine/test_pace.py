"""Prompts beside answers: how many tokens of them a step takes on."""

import pytest

from server.engine.pace import Pace
from tests.server.engine.pretend import PretendEngine, expected, request


def test_it_allows_what_doubles_a_step() -> None:
    pace = Pace(stretch=2.0)
    assert pace.prompt_tokens(8) is None  # nothing seen yet
    for _ in range(200):
        pace.saw(answers=8, prompt_tokens=0, seconds=0.040)
        pace.saw(answers=8, prompt_tokens=100, seconds=0.090)
    # A token costs half a millisecond more, so 80 take as long as the answers alone.
    assert pace.prompt_tokens(8) == 80
    assert pace.prompt_tokens(0) is None  # nobody waits for a next token
    assert pace.prompt_tokens(0, others=True) == 80  # but somebody may come


def test_before_it_has_seen_both_together_it_knows_a_bound() -> None:
    pace = Pace(stretch=2.0)
    pace.saw(answers=1, prompt_tokens=0, seconds=0.040)
    assert pace.prompt_tokens(0, others=True) is None
    pace.saw(answers=0, prompt_tokens=100, seconds=0.100)
    assert pace.prompt_tokens(0, others=True) == pace.prompt_tokens(4) == 32
    pace.saw(answers=4, prompt_tokens=100, seconds=0.090)
    assert pace.prompt_tokens(4) == 80


def test_it_follows_the_machine_and_never_starves_prompts() -> None:
    pace = Pace()
    for _ in range(200):
        pace.saw(8, 0, 0.040)
        pace.saw(8, 100, 0.090)
    for _ in range(200):
        pace.saw(8, 100, 5.0)
    assert pace.prompt_tokens(8) == 16
    for _ in range(200):
        pace.saw(8, 100, 0.039)  # free: reading the weights is all that costs
    allowed = pace.prompt_tokens(8)
    assert allowed is None or allowed > 10_000


@pytest.mark.parametrize("newcomer", [False, True])
def test_a_crowd_of_one_line_is_paced_and_a_newcomer_is_not(newcomer: bool) -> None:
    pretend = PretendEngine(pages=400, prefix_cache=False, max_batch_tokens=64)
    try:
        for name in ("a", "b"):
            pretend.run(request(name, new=1))  # loaded
        for _ in range(4):
            pretend.submit(request("a", new=50))
        for _ in range(5):
            pretend.step()
        pace = pretend.engine._loop._pace
        pace.saw = lambda *seen: None  # type: ignore[method-assign]
        pace.prompt_tokens = lambda answers, others: 16 if answers else None  # type: ignore[method-assign]
        asked = request("b" if newcomer else "a", prompt=[1] * 48, new=3)
        reader = pretend.submit(asked)
        before = pretend.counts.steps
        pretend.finish(reader)
        assert reader.token_ids == expected(asked)
        steps = pretend.counts.step_of_first_token[asked.id] - before
        assert steps == (1 if newcomer else 3)
    finally:
        pretend.close()


@pytest.mark.parametrize("others", [False, True])
def test_a_crowd_that_begins_together_takes_the_whole_step_only_where_nobody_else_comes(others: bool) -> None:
    pretend = PretendEngine(pages=400, prefix_cache=False, max_batch_tokens=64, max_sequences=8)
    try:
        pretend.run(request("a", new=1))
        if others:
            pretend.run(request("b", new=1))
        pace = pretend.engine._loop._pace
        pace.saw = lambda *seen: None  # type: ignore[method-assign]
        pace._answers, pace._token = 0.040, 0.0025  # sixteen tokens double a step
        computed = []
        run = pretend.engine._run

        def counted(batch, between=None):  # type: ignore[no-untyped-def]
            computed.append(sum(share.tokens for share in batch.shares))
            return run(batch, between)

        pretend.engine._run = counted  # type: ignore[method-assign]
        readers = [pretend.submit(request("a", prompt=[1] * 24, new=2)) for _ in range(4)]
        for reader in readers:
            pretend.finish(reader)
        assert computed[0] == (16 if others else 64)
        assert max(computed) <= (16 + 4 if others else 64)
    finally:
        pretend.close()
