"""Anything in any order, and after each thing everything adds up; and many cancels that leave nothing."""

import random
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from hub.errors import HubUnavailable
from server.engine.request import Request, Sampling
from server.errors import (
    AdapterInUse,
    Cancelled,
    EngineFailed,
    NonFiniteLogits,
    QueueFull,
    RequestTooLarge,
    ServerError,
)
from tests.server.engine.pretend import PretendEngine, Reader, expected, request

NAMES = ("a", "b", "c", "d", "wide", PretendEngine.POISON, "slow", "broken")
uses = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from([1.0, 0.5, -1.0, 0.0])), max_size=3, unique_by=lambda use: use[0]
)


class EngineMachine(RuleBasedStateMachine):
    """Requests, cancels, loads, unloads, pins, a hub that hangs and fails, and steps."""

    @initialize(
        pages=st.integers(6, 30),
        adapters=st.integers(1, 4),
        budget=st.integers(4, 40),
        cache=st.booleans(),
        kind=st.sampled_from(["", "rests", "ahead"]),
    )
    def begin(self, pages: int, adapters: int, budget: int, cache: bool, kind: str) -> None:
        self.pretend = PretendEngine(
            pages=pages,
            adapters=adapters,
            rests=kind == "rests",
            ahead=kind == "ahead",
            max_batch_tokens=budget,
            prefix_cache=cache,
            max_waiting=12,
            max_waiting_per_tenant=9,
            host_adapter_memory_bytes=300,
        )
        self.pretend.hub.ranks["wide"] = 12
        self.gate = self.pretend.hub.slow["slow"] = threading.Event()
        self.pretend.hub.broken["broken"] = HubUnavailable("the hub does not answer")
        self.asked: list[tuple[Request, Reader]] = []
        self.cancelled: set[str] = set()
        self.pinned: set[str] = set()

    @rule(
        adapters=uses,
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=14),
        new=st.integers(1, 12),
        tenant=st.sampled_from(["", "x", "y"]),
        seed=st.one_of(st.none(), st.integers(0, 9)),
    )
    def submit(self, adapters: Any, prompt: list[int], new: int, tenant: str, seed: int | None) -> None:
        sampling = Sampling() if seed is None else Sampling(temperature=1.0, seed=seed)
        asked = request(*adapters, prompt=prompt, new=new, tenant=tenant, sampling=sampling)
        try:
            self.asked.append((asked, self.pretend.submit(asked)))
        except (QueueFull, RequestTooLarge):
            assert asked.id not in self.pretend.engine._door.inside()

    @rule(choice=st.randoms(use_true_random=False))
    def cancel(self, choice: random.Random) -> None:
        if self.asked:
            asked, _ = choice.choice(self.asked)
            self.pretend.engine.cancel(asked.id)
            self.cancelled.add(asked.id)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.pretend.step()

    @rule(
        adapters=uses,
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=14),
        new=st.integers(1, 12),
        tenant=st.sampled_from(["", "x", "y"]),
        cancel=st.booleans(),
    )
    def step_in_which_one_comes(self, adapters: Any, prompt: list[int], new: int, tenant: str, cancel: bool) -> None:
        def come() -> None:
            self.pretend.at_rest = lambda: None
            self.submit(adapters=adapters, prompt=prompt, new=new, tenant=tenant, seed=None)
            if cancel:
                self.cancel(random.Random(len(self.asked)))

        self.pretend.at_rest = come
        self.pretend.step()
        self.pretend.at_rest = lambda: None

    @rule(name=st.sampled_from(NAMES))
    def load(self, name: str) -> None:
        residency = self.pretend.residency
        residency.release(residency.acquire((name,), (f"t/{name}@1",)))

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        try:
            self.pretend.residency.unload(name)
        except AdapterInUse:
            assert name in self.pinned

    @rule(name=st.sampled_from(["a", "b"]))
    def pin(self, name: str) -> None:
        self.pretend.residency.pin(name)
        self.pinned.add(name)

    @rule(name=st.sampled_from(["a", "b"]))
    def unpin(self, name: str) -> None:
        self.pretend.residency.unpin(name)
        self.pinned.discard(name)

    @rule()
    def evict(self) -> None:
        """Ask for every page there is, as a large request would, and give them back."""
        table = self.pretend.engine._pages
        pages = table.allocate(table.free)
        assert pages is not None
        table.release(pages)
        assert table.cached == 0

    @rule()
    def hang_or_answer(self) -> None:
        if self.gate.is_set():
            self.gate = self.pretend.hub.slow["slow"] = threading.Event()
        else:
            self.gate.set()

    @rule()
    def the_hub_comes_and_goes(self) -> None:
        if self.pretend.hub.broken:
            self.pretend.hub.broken.clear()
        else:
            self.pretend.hub.broken["broken"] = HubUnavailable("the hub does not answer")

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "pretend"):
            self.pretend.engine.check_integrity()

    def teardown(self) -> None:
        if not hasattr(self, "pretend"):
            return
        try:
            for gate in (self.gate, self.pretend.hub.slow["slow"]):
                gate.set()
            for name in self.pinned:
                self.pretend.residency.unpin(name)
            self.pretend.finish(*(reader for _, reader in self.asked))
            for asked, reader in self.asked:
                self._check(asked, reader)
            self.pretend.check_empty()
        finally:
            self.pretend.close()

    def _check(self, asked: Request, reader: Reader) -> None:
        poisoned = any(use.digest == PretendEngine.POISON and use.weight for use in asked.adapters)
        if reader.error is None:
            assert not poisoned
            assert reader.token_ids == expected(asked)
            return
        assert isinstance(reader.error, ServerError | HubUnavailable)
        assert not isinstance(reader.error, EngineFailed)
        assert isinstance(reader.error, Cancelled) == (asked.id in self.cancelled) or not isinstance(
            reader.error, Cancelled
        )
        if isinstance(reader.error, NonFiniteLogits):
            assert any(use.digest == PretendEngine.POISON for use in asked.adapters)
        if reader.token_ids:  # what was streamed before the end is right all the same
            assert reader.token_ids == expected(asked)[: len(reader.token_ids)]


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.mark.parametrize("ahead", [False, True])
def test_ten_thousand_cancels_leak_nothing(ahead: bool) -> None:
    """Cancelled before, while and after they load, wait, run, or were preempted."""
    rng = random.Random()
    pretend = PretendEngine(pages=40, adapters=3, ahead=ahead, max_waiting=200, max_waiting_per_tenant=120)
    cancels = 0
    inside: dict[str, Reader] = {}
    try:
        while cancels < 10_000:
            for _ in range(rng.randrange(40)):
                asked = request(
                    *rng.sample(["a", "b", "c", "d", "e"], rng.randrange(3)),
                    prompt=[rng.randrange(3) for _ in range(rng.randrange(1, 40))],
                    new=rng.randrange(1, 40),
                    tenant=rng.choice(["", "x", "y"]),
                )
                try:
                    inside[asked.id] = pretend.submit(asked)
                except QueueFull:
                    break
            for _ in range(rng.randrange(3)):
                pretend.step()
            for name in rng.sample(list(inside), rng.randrange(len(inside) + 1)):
                pretend.engine.cancel(name)
                cancels += not inside.pop(name).ended
            if rng.random() < 0.05:
                pretend.residency.unload(rng.choice("abcde"))
                pretend.step()
                pretend.engine.check_integrity()
        assert pretend.counts.preemptions
        assert pretend.counts.hit_tokens
        for name in inside:
            pretend.engine.cancel(name)
        pretend.step()
        assert all(reader.ended for reader in inside.values())
        pretend.check_empty()
    finally:
        pretend.close()
