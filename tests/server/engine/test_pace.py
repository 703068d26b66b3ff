"""Prompts beside answers: how many tokens of them a step takes on."""

from random import Random

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
    assert allowed == 400  # four times what it has seen, and so on from there
    for _ in range(200):
        pace.saw(8, allowed, 0.039)
    assert pace.prompt_tokens(8) == 1600


def test_what_prompts_cost_once_is_paid_for_many_tokens() -> None:
    """As on a GPU: 30 ms for launches that no graph holds, 25 µs a token, beside steps of 6 ms."""
    pace = Pace()
    pace.saw(0, 256, 12.0)  # compiles
    allowed = []
    for _ in range(40):
        pace.saw(32, 0, 0.006)
        tokens = pace.prompt_tokens(32) or 0
        allowed.append(tokens)
        pace.saw(32, tokens, 0.006 + 0.030 + 25e-6 * tokens)
    assert allowed[:9] == [16] * 8 + [32]  # a token may cost all of it, until a larger step has been tried
    assert 1100 <= allowed[-1] <= 1200  # 25 µs of these are 30 ms


def test_a_slow_step_now_and_then_changes_little() -> None:
    random = Random()
    pace = Pace()
    for step in range(60):
        pace.saw(8, 0, 0.040)
        tokens = random.choice([32, 64, 80, 128])
        pace.saw(8, tokens, 0.040 + 0.0005 * tokens * random.uniform(0.95, 1.05) + (0.5 if step % 4 == 0 else 0.0))
    assert 48 <= (pace.prompt_tokens(8) or 0) <= 96


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
        pace.prompt_tokens = lambda answers, others: 16 if answers else None  # type: ignore[method-assign,misc,assignment]
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
        pace._answers = 0.040
        pace._beside.saw(64, 0.160)  # sixteen tokens double a step
        computed = []
        run = pretend.engine._computing._run

        def counted(batch, between=None):  # type: ignore[no-untyped-def]
            computed.append(sum(share.tokens for share in batch.shares))
            return run(batch, between)

        pretend.engine._computing._run = counted  # type: ignore[method-assign]
        readers = [pretend.submit(request("a", prompt=[1] * 24, new=2)) for _ in range(4)]
        for reader in readers:
            pretend.finish(reader)
        assert computed[0] == (16 if others else 64)
        assert max(computed) <= (16 + 4 if others else 64)
    finally:
        pretend.close()
