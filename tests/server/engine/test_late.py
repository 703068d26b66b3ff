"""Answers handed out while the next step runs, as on a GPU."""

from __future__ import annotations

import dataclasses

import pytest

from server.engine.request import Sampling, Stopping
from server.errors import EngineFailed
from tests.server.engine.pretend import PretendEngine, expected, request


@pytest.fixture
def late() -> PretendEngine:
    """An engine whose steps hand out, while they are computed, what the step before them chose."""
    return PretendEngine(ahead=True)


def test_a_steps_token_comes_with_the_next_step(late: PretendEngine) -> None:
    asked = request("a", new=3)
    try:
        late.run(request("a", new=1))  # the adapter is loaded
        reader = late.submit(asked)
        seen = []
        for _ in range(4):
            late.step()
            seen.append(len(reader.token_ids))
        assert seen == [0, 1, 2, 3]  # the last one by a step with nothing to compute
        assert reader.ended and reader.token_ids == expected(asked)
    finally:
        late.close()


def test_a_cancelled_answer_ends_after_what_was_chosen(late: PretendEngine) -> None:
    asked = request("a", new=50)
    try:
        late.run(request("a", new=1))
        reader = late.submit(asked)
        late.step()
        late.step()
        late.engine.cancel(asked.id)
        late.step()
        assert reader.ended and reader.error is not None
        assert reader.token_ids == expected(asked)[:2]
    finally:
        late.close()


def test_stop_strings_end_an_answer_at_once(late: PretendEngine) -> None:
    """They are looked for when a token is chosen, not when it is handed out: no step is computed in vain."""
    plain = request("a", new=8)
    try:
        (whole,) = late.run(plain)
        assert whole.ended
        third = late.engine.text.stream()
        words = [third.push(token) for token in whole.token_ids]
        stop = words[2].strip() or words[2]
        before = late.counts.steps
        stopping = Stopping(max_new_tokens=8, ignore_eos=True, stop_strings=(stop,))
        asked = dataclasses.replace(request("a"), stopping=stopping)
        (reader,) = late.run(asked)
        assert reader.token_ids == expected(asked)[: len(reader.token_ids)]
        assert len(reader.token_ids) <= 3
        assert late.counts.steps - before <= len(reader.token_ids) + 1
    finally:
        late.close()


def test_nothing_waits_when_the_engine_falls_idle(late: PretendEngine) -> None:
    """Its own thread, not ours, drives the steps."""
    late.engine.start()
    try:
        answers = late.engine.generate([request("a", new=5), request("b", new=2)])
        assert [len(answer.token_ids) for answer in answers] == [5, 2]
        assert late.engine.drain(5.0)
        assert late.engine.snapshot().running == 0
    finally:
        late.close()


def test_seeds_and_steps_are_as_ever(late: PretendEngine) -> None:
    other = PretendEngine()
    try:
        sampling = Sampling(temperature=1.0, seed=7)
        asked = [request("a", new=6, sampling=sampling), request("b", new=9, sampling=sampling)]
        ours, theirs = late.run(*asked), other.run(*asked)
        assert [reader.token_ids for reader in ours] == [reader.token_ids for reader in theirs]
    finally:
        late.close()
        other.close()


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("stops", [(), ("never there",)], ids=["told", "taken"])
def test_a_token_without_words_ends_its_own_answer_alone(
    at_the_end: bool, is_late: bool, stops: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the words are wanted when it is handed out, or when it is chosen, to look for stop strings."""
    late = PretendEngine(ahead=is_late)
    asked, other = request("a", new=1 if at_the_end else 9), request("b", new=4)
    asked = dataclasses.replace(asked, stopping=dataclasses.replace(asked.stopping, stop_strings=stops))
    begin = late.engine._sequence

    def broken(one, outbox):  # type: ignore[no-untyped-def]
        sequence = begin(one, outbox)
        if one is asked:
            monkeypatch.setattr(sequence.detokenizer, "push", lambda token: 1 / 0)
        return sequence

    monkeypatch.setattr(late.engine, "_sequence", broken)
    try:
        ours, theirs = late.run(asked, other)
        assert isinstance(ours.error, EngineFailed) and ours.token_ids == []
        assert theirs.error is None and theirs.token_ids == expected(other)
        late.check_empty()
    finally:
        late.close()


@pytest.mark.parametrize("is_late", [False, True])
def test_a_step_that_fails_on_its_way_leaves_those_whom_it_ended(
    is_late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = PretendEngine(ahead=is_late)
    done, other = request("a", new=1), request("a", new=9)
    ended: list[str] = []
    monkeypatch.setattr(late.counts, "finished", lambda asked, finish, error: ended.append(asked.id))
    keep = late.scheduler.keep

    def failing(sequence):  # type: ignore[no-untyped-def]
        if sequence.request is other:
            raise RuntimeError("a kernel went wrong")
        keep(sequence)

    monkeypatch.setattr(late.scheduler, "keep", failing)
    try:
        first, second = late.run(done, other)
        assert first.error is None and first.token_ids == expected(done)
        assert isinstance(second.error, EngineFailed)
        assert ended == [done.id, other.id]
        late.check_empty()
    finally:
        late.close()
