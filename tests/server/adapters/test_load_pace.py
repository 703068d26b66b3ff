"""Loading keeps within its share of a core while somebody is answered, and only then."""

from __future__ import annotations

import threading

import pytest

from server.adapters.load_pace import LoadPace


class Clock:
    """Time that passes when a loader waits or works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.computed = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.computed += seconds


def paced(clock: Clock, busy: bool, monkeypatch: pytest.MonkeyPatch) -> LoadPace:
    pace = LoadPace(lambda: busy, share=0.25, saved=0.1, clock=lambda: clock.now, spent=lambda: clock.computed)

    def wait(seconds: float) -> bool:
        clock.now += seconds
        return False

    monkeypatch.setattr(pace._closed, "wait", wait)
    return pace


def test_a_share_of_a_core_in_the_long_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    pace = paced(clock, True, monkeypatch)
    while clock.now < 20:
        with pace.turn():
            clock.work(0.03)
    assert clock.computed == pytest.approx(0.25 * clock.now, rel=0.03)


def test_what_a_load_takes_after_its_turn_counts_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the copy into the arena does, which another thread makes."""
    clock = Clock()
    pace = paced(clock, True, monkeypatch)
    while clock.now < 20:
        with pace.turn():
            clock.work(0.02)
        with pace.charged():
            clock.work(0.02)
    assert clock.computed == pytest.approx(0.25 * clock.now, rel=0.03)


def test_what_was_saved_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    pace = paced(clock, True, monkeypatch)
    clock.now = 1000.0
    for _ in range(3):
        with pace.turn():
            clock.work(0.03)
    assert clock.now == pytest.approx(1000.09)
    for _ in range(5):
        with pace.turn():
            clock.work(0.03)
    assert clock.now > 1000.3


def test_nobody_waits_beside_an_idle_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    pace = paced(clock, False, monkeypatch)
    for _ in range(100):
        with pace.turn():
            clock.work(0.03)
    assert clock.now == pytest.approx(3.0)


def test_threads_do_not_spend_the_same_allowance_twice() -> None:
    """Those that begin together are charged before they have worked."""
    clock = Clock()
    pace = LoadPace(lambda: True, share=0.25, saved=0.015, clock=lambda: clock.now, spent=lambda: clock.computed)
    begun = [pace._begin() is not None for _ in range(8)]
    assert begun == [True, True, *[False] * 6]


def test_nobody_waits_long_for_anothers_expensive_load(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    pace = paced(clock, True, monkeypatch)
    for _ in range(3):
        with pace.turn():
            clock.work(60)
        with pace.charged():
            clock.work(5)
        ended = clock.now
        with pace.turn():  # of somebody else
            assert 1 < clock.now - ended < 2.01


def test_nobody_waits_long_beside_a_load_that_will_be_expensive(monkeypatch: pytest.MonkeyPatch) -> None:
    """As others were before it: what is expected of it is charged when it begins."""
    clock = Clock()
    pace = paced(clock, True, monkeypatch)
    for _ in range(3):
        with pace.turn():
            clock.work(60)
    with pace.turn():
        began = clock.now
        with pace.turn():
            assert clock.now - began < 2.01


def test_a_failed_load_is_charged_too_and_closing_frees_those_who_wait() -> None:
    clock = Clock()
    pace = LoadPace(lambda: True, share=0.25, saved=0.01, clock=lambda: clock.now, spent=lambda: clock.computed)
    with pytest.raises(ValueError, match="broken"), pace.turn():
        clock.work(0.5)
        raise ValueError("broken")
    passed = threading.Event()

    def wait() -> None:
        with pace.turn():
            passed.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not passed.wait(0.1)
    pace.close()
    thread.join(10)
    assert passed.is_set()
