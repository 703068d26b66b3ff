"""Newcomers beside a flood: who is let in while a step rests, and who is not."""

import threading
from collections.abc import Callable

import pytest

from server.engine.fair_queue import BURST, Tenant
from server.engine.interlude import SAVED, SHARE, Interludes
from server.engine.request import Request
from tests.server.engine.pretend import PretendEngine, Reader, expected, request


class Flooded:
    """Four run and `waiting` wait of one line; `come` submits at the next rest of a step.

    What `warm` names is on the device before the flood: a load takes as many steps as its thread lets pass.
    """

    def __init__(
        self, *, waiting: int = 20, pages: int = 200, prompt: int = 5, warm: tuple[str, ...] = ("loud", "quiet")
    ) -> None:
        self.pretend = PretendEngine(
            rests=True, max_sequences=4, adapters=5, pages=pages, prefix_cache=False, max_batch_tokens=32
        )
        self.pretend.finish(*(self.pretend.submit(request(name, new=1, tenant="warm")) for name in warm))
        self.asked: list[Request] = []
        self.readers: list[Reader] = []
        for _ in range(4 + waiting):
            self.send(request("loud", prompt=[1] * prompt, new=12))
        for _ in range(3):
            self.pretend.step()
        assert len(self.pretend.scheduler.running) == 4
        assert self.pretend.scheduler.crowded == (waiting > 0)

    def send(self, asked: Request) -> Reader:
        self.asked.append(asked)
        self.readers.append(self.pretend.submit(asked))
        return self.readers[-1]

    def come(self, *asked: Request, also: Callable[[], None] = lambda: None) -> list[Reader]:
        """One step, in which these come; what they have after it."""
        readers: list[Reader] = []

        def arrive() -> None:
            self.pretend.at_rest = lambda: None
            also()
            readers.extend(self.send(one) for one in asked)

        self.pretend.at_rest = arrive
        self.pretend.step()
        return readers

    def end(self) -> None:
        """Everybody gets what is his."""
        self.pretend.finish(*self.readers)
        for asked, reader in zip(self.asked, self.readers, strict=True):
            assert reader.error is None
            assert reader.token_ids == expected(asked)
        self.pretend.check_empty()
        self.pretend.close()


def test_a_newcomer_has_his_first_token_before_the_step_at_rest_ends() -> None:
    world = Flooded()
    progress = [len(reader.token_ids) for reader in world.readers[:4]]
    newcomer = request("quiet", prompt=[2] * 9, new=3)
    before = world.pretend.counts.steps
    [reader] = world.come(newcomer)
    assert len(reader.token_ids) == 1
    assert world.pretend.counts.step_of_first_token[newcomer.id] == before + 1
    assert world.pretend.counts.steps == before + 2
    assert world.pretend.counts.interludes == 1
    assert [len(reader.token_ids) for reader in world.readers[:4]] == [count + 1 for count in progress]
    world.pretend.engine.check_integrity()
    world.end()


def test_the_places_of_a_step_hold_afterwards() -> None:
    world = Flooded()
    world.come(*(request("quiet", prompt=[2] * 3, new=9, tenant=f"new {i}") for i in range(3)))
    assert len(world.pretend.scheduler.running) == 7
    world.pretend.step()
    assert len(world.pretend.scheduler.running) == 4
    assert world.pretend.counts.preemptions == 3  # of the flood
    assert {s.request.adapters[0].digest for s in world.pretend.scheduler.running} == {"loud", "quiet"}
    world.end()


def test_who_came_while_the_last_layers_ran_is_computed_before_the_next_step() -> None:
    world = Flooded()
    reader = world.send(request("quiet", prompt=[2] * 9, new=1))
    seen = []

    def look() -> None:
        seen.append(len(reader.token_ids))

    world.pretend.at_rest = look
    world.pretend.step()
    assert seen == [1]
    world.end()


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (request("loud", new=2), "his line runs several itself"),
        (request("quiet", prompt=[2] * 33, new=2), "more than a step computes"),
        (request("cold", new=2), "his adapter is not on the device"),
    ],
)
def test_who_waits_for_his_turn(asked: Request, why: str) -> None:
    world = Flooded()
    if asked.adapters[0].digest == "cold":
        world.pretend.hub.slow["cold"] = threading.Event()
    [reader] = world.come(asked)
    assert not reader.token_ids, why
    if asked.adapters[0].digest == "cold":
        world.pretend.hub.slow["cold"].set()
    world.end()


def test_a_second_one_of_a_line_joins_the_others() -> None:
    world = Flooded()
    first, second = world.come(*(request("quiet", prompt=[2] * 3, new=4) for _ in range(2)))
    assert (len(first.token_ids), len(second.token_ids)) == (1, 0)
    world.end()


def test_nobodys_pages_are_taken() -> None:
    """16 pages of 4 tokens: the four that run hold 8 and will need one more each."""
    world = Flooded(pages=16)
    [reader] = world.come(request("quiet", prompt=[2] * 20, new=2))
    assert not reader.token_ids
    assert world.pretend.counts.preemptions == 0
    world.end()


def test_no_step_rests_where_nobody_waits() -> None:
    world = Flooded(waiting=0)

    def never() -> None:
        raise AssertionError("a step rested")

    world.pretend.at_rest = never
    world.pretend.step()
    world.pretend.at_rest = lambda: None
    world.end()
    assert world.pretend.counts.interludes == 0


def test_a_newcomer_of_the_floods_tenant_is_one_too() -> None:
    world = Flooded()
    readers = world.come(request("quiet", prompt=[2] * 3, new=2), request("quiet", new=2, tenant="other"))
    assert [len(reader.token_ids) for reader in readers] == [1, 1]
    world.end()


def test_cancelled_at_rest() -> None:
    """One whose step is at rest, and a newcomer."""
    world = Flooded()
    victim = world.asked[0]
    [reader] = world.come(request("quiet", new=5), also=lambda: world.pretend.engine.cancel(victim.id))
    assert len(reader.token_ids) == 1
    world.pretend.engine.cancel(world.asked[-1].id)
    world.pretend.step()
    assert reader.ended
    assert world.readers[0].ended
    world.pretend.engine.check_integrity()
    for at in (-1, 0):
        del world.asked[at], world.readers[at]
    world.end()


def test_a_newcomer_whose_numbers_are_not_finite_harms_only_himself() -> None:
    world = Flooded(warm=("loud", "quiet", PretendEngine.POISON))
    [reader] = world.come(request(PretendEngine.POISON, new=2))
    assert reader.error is not None
    del world.asked[-1], world.readers[-1]
    world.end()


def test_interludes_have_a_share_of_the_time() -> None:
    now = 0.0
    interludes = Interludes(lambda: now)

    def one(seconds: float) -> None:
        nonlocal now
        with interludes.timed():
            now += seconds

    assert interludes.due()
    one(SAVED)
    assert interludes.due()  # while it ran, its share grew
    one(4.0)
    assert not interludes.due()
    assert interludes.seconds == SAVED + 4.0
    owed = 4.0 - SHARE * (SAVED + 4.0)
    now += 0.99 * owed / SHARE
    assert not interludes.due()
    now += 0.02 * owed / SHARE
    assert interludes.due()
    now += 1e6  # idle: no more than so much is saved up
    assert interludes.due()
    one(SAVED + 0.01 + SHARE * SAVED)
    one(SHARE * SAVED)
    assert not interludes.due()


def test_who_was_served_much_more_waits_for_his_turn() -> None:
    world = Flooded()
    lines = world.pretend.scheduler.waiting.tenants
    lines["heavy"] = Tenant(served=min(line.served for line in lines.values()) + BURST + 200)
    [heavy] = world.come(request("quiet", new=2, tenant="heavy"))
    assert not heavy.token_ids
    lines["light"] = Tenant(served=min(line.served for line in lines.values() if line.active) + BURST - 50)
    [light] = world.come(request("quiet", new=2, tenant="light"))
    assert len(light.token_ids) == 1
    world.end()


def test_used_up_time_sends_newcomers_into_the_line() -> None:
    world = Flooded()
    with world.pretend.engine._loop._interludes.timed():
        pass
    world.pretend.engine._loop._interludes._saved = -100.0
    [reader] = world.come(request("quiet", new=2))
    assert not reader.token_ids
    world.end()
