"""Adapters come side by side, go in order, stay when pinned, and never keep others waiting for ever."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hub.errors import HubUnavailable
from server.adapters.arena import Arena
from server.adapters.device_cache import DeviceCache
from server.adapters.residency import Tier
from server.errors import AdapterInUse, Cancelled, RequestTooLarge
from tests.server.engine.pretend import RANK, PretendEngine, expected, request


@pytest.fixture
def pretend() -> Iterator[PretendEngine]:
    pretend = PretendEngine(adapters=2)
    yield pretend
    for gate in pretend.hub.slow.values():
        gate.set()
    pretend.close()
    pretend.check_empty()


def tiers(pretend: PretendEngine) -> dict[str, Tier]:
    return {status.digest: status.tier for status in pretend.residency.list()}


def test_a_slow_fetch_delays_only_who_needs_it(pretend: PretendEngine) -> None:
    pretend.hub.slow["slow"] = threading.Event()
    waiting = [pretend.submit(request("slow")), pretend.submit(request("slow", "a"))]
    pretend.run(request("a"), request("b"), request(), request("c"))
    assert not any(reader.ended for reader in waiting)
    assert tiers(pretend)["slow"] is Tier.LOADING
    pretend.hub.slow["slow"].set()
    pretend.finish(*waiting)
    assert pretend.hub.fetched.count("slow") == 1


def test_an_unreachable_hub_fails_only_who_needs_it(pretend: PretendEngine) -> None:
    pretend.run(request("a"))
    pretend.hub.broken["b"] = HubUnavailable("the hub does not answer")
    asked = [request("a"), request("b"), request("a", "b"), request()]
    good, bad, both, base = pretend.run(*asked)
    assert isinstance(bad.error, HubUnavailable)
    assert isinstance(both.error, HubUnavailable)
    assert good.token_ids == expected(asked[0])
    assert base.token_ids == expected(asked[3])
    del pretend.hub.broken["b"]
    assert pretend.run(request("b"))[0].error is None  # nobody remembers the failure


def test_a_cancelled_ticket_vanishes_and_its_fetch_is_not_begun(pretend: PretendEngine) -> None:
    gates = [f"slow{i}" for i in range(8)]  # as many as fetch at once
    for name in gates:
        pretend.hub.slow[name] = threading.Event()
    asked = [request(name) for name in [*gates, "never"]]
    readers = [pretend.submit(one) for one in asked]
    pretend.wait(lambda: len(pretend.hub.fetched) == 8)
    for one in asked:
        pretend.engine.cancel(one.id)
    pretend.step()
    assert all(isinstance(reader.error, Cancelled) for reader in readers)
    assert pretend.residency.list() == []
    for name in gates:
        pretend.hub.slow[name].set()
    pretend.run(request("a"))
    pretend.wait(lambda: not pretend.residency._host_loader.fetching)
    assert "never" not in pretend.hub.fetched


def test_more_than_fit_are_queued_in_order(pretend: PretendEngine) -> None:
    asked = [request(name, prompt=[i]) for i, name in enumerate("abcdeabcde")]
    readers = pretend.run(*asked)
    assert [r.token_ids for r in readers] == [expected(one) for one in asked]


def test_tickets_for_several_never_wait_for_each_other(pretend: PretendEngine) -> None:
    """a+b, c+d, b+c, …: each needs the whole arena."""
    asked = [request(*pair, prompt=[i]) for i in range(3) for pair in ("ab", "cd", "bc", "da", "ac")]
    readers = pretend.run(*asked)
    assert all(reader.error is None for reader in readers)
    [three] = pretend.run(request("a", "b", "c"))
    assert isinstance(three.error, RequestTooLarge)


def test_a_popular_adapter_does_not_keep_its_rows_for_ever(pretend: PretendEngine) -> None:
    """Both places are taken by a stream of requests that never ends; a third adapter gets in all the same."""
    crowd = [pretend.submit(request("a", "b", new=6)) for _ in range(20)]
    for _ in range(3):
        pretend.step()
        pretend.wait(lambda: any(s.ticket.ready for s in pretend.scheduler.waiting) or pretend.scheduler.running)
    modest = pretend.submit(request("c"))
    for _ in range(400):
        crowd.append(pretend.submit(request("a", "b", new=6)))
        pretend.step()
        if modest.ended:
            break
        if not pretend.scheduler.running:
            pretend.wait(lambda: pretend.scheduler.has_work())
    assert modest.ended
    assert modest.error is None
    pretend.finish(*crowd)
    assert all(reader.error is None for reader in crowd)


def test_the_engine_does_not_fall_asleep_over_an_adapter_that_is_to_make_room() -> None:
    """The flow's first request gave its lease back; the second one still has its own when the last answer ends."""
    pretend = PretendEngine(adapters=1, max_sequences=1)
    try:
        pretend.run(request("a"))
        last = pretend.submit(request(new=3, tenant="other"))
        pretend.step()
        first = pretend.submit(request("a", new=2))
        pretend.step()  # it was passed over once
        readers = [first, pretend.submit(request("a", new=2)), pretend.submit(request("b", new=2, tenant="third"))]
        pretend.wait(lambda: pretend.residency._device["a"].yielding)
        pretend.finish(last, *readers, seconds=5)
        assert all(reader.error is None for reader in readers)
        pretend.check_empty()
    finally:
        pretend.close()


def test_what_can_never_fit_is_refused_before_anybody_makes_room_for_it() -> None:
    pretend = PretendEngine(adapters=3)
    try:
        pretend.run(request("a"), request("b"))
        running = pretend.submit(request("a", new=9))
        pretend.step()
        asked = request("c", "d", "e", "f")
        refused = pretend.submit(asked)
        ticket = pretend.engine._door.inside()[asked.id].ticket
        pretend.wait(lambda: ticket.error is not None, seconds=3)  # no answer need end for that
        assert set(pretend.residency._device) == {"a", "b"}
        assert not any(resident.yielding for resident in pretend.residency._device.values())
        pretend.finish(running, refused)
        assert isinstance(refused.error, RequestTooLarge)
        assert f"need {4 * RANK} rows, the server has {3 * RANK}" in str(refused.error)
    finally:
        pretend.close()


@pytest.mark.parametrize("host_bytes", [1, 1 << 30])
@pytest.mark.parametrize("used", [False, True])
def test_whether_adapters_fit_does_not_depend_on_where_one_of_them_lies(used: bool, host_bytes: int) -> None:
    """One of the two lies in the middle of the rows, somebody's or nobody's."""
    pretend = PretendEngine(adapters=8, host_adapter_memory_bytes=host_bytes)
    pretend.hub.ranks = {"before": 3 * RANK, "big": 5 * RANK}
    try:
        pretend.run(request("before"))
        pretend.run(request("small"))
        assert pretend.residency._device["small"].rows.start == 3 * RANK
        readers = [pretend.submit(request("small", new=20))] if used else []
        pretend.step()
        asked = request("small", "big")
        readers += [pretend.submit(asked), pretend.submit(request("small", new=3))]
        pretend.finish(*readers)
        assert [reader.error for reader in readers] == [None] * len(readers)
        assert readers[-2].token_ids == expected(asked)
        pretend.check_empty()
    finally:
        pretend.close()


def test_adapters_that_fit_one_by_one_and_not_together_are_refused_by_their_parts() -> None:
    def adapter(digest: str, part_bytes: int) -> Any:
        return SimpleNamespace(digest=digest, rank=RANK, parts=SimpleNamespace(bytes=part_bytes))

    device = DeviceCache(Arena({}, 8 * RANK, torch.float32, "cpu"), parts_budget=100)
    device.refuse_oversized({"a": adapter("a", 60), "b": adapter("b", 40)})
    with pytest.raises(RequestTooLarge, match=r"together need 120 bytes .* has 100 \(--adapter-parts-memory\)"):
        device.refuse_oversized({"a": adapter("a", 60), "b": adapter("b", 60)})
    pinned = adapter("pinned", 50)
    rows = device.allocate(pinned)
    assert rows is not None
    device.put(SimpleNamespace(**vars(pinned), warnings=(), reaches_kv=True), "t/pinned@1", rows, pinned.parts)  # type: ignore[arg-type]
    device.pinned.add("pinned")
    with pytest.raises(RequestTooLarge, match="100, 50 of them for pinned adapters"):
        device.refuse_oversized({"a": adapter("a", 60)})
    device.refuse_oversized({"a": adapter("a", 50), "pinned": pinned})


def test_the_least_recently_used_goes_and_the_pinned_stays(pretend: PretendEngine) -> None:
    pretend.residency.pin("a")
    for name in "abcbd":
        pretend.run(request(name))
    held = {digest for digest, tier in tiers(pretend).items() if tier is Tier.DEVICE}
    assert held == {"a", "d"}
    [pinned] = [status for status in pretend.residency.list() if status.pinned]
    assert pinned.digest == "a"
    with pytest.raises(AdapterInUse):
        pretend.residency.unload("a")
    pretend.residency.pin("d")
    [refused] = pretend.run(request("e"))
    assert isinstance(refused.error, RequestTooLarge)
    pretend.residency.unpin("a")
    pretend.residency.unpin("d")
    assert pretend.run(request("e"))[0].error is None
    assert pretend.residency.unload("a") is True


def test_unload_frees_rows_and_host_memory(pretend: PretendEngine) -> None:
    pretend.run(request("a"), request("b"))
    free = pretend.residency._arena.free_rows()
    assert pretend.residency.unload("a") is True
    assert "a" not in tiers(pretend)
    assert pretend.residency._arena.free_rows() == free + RANK
    assert pretend.residency._host.bytes == pretend.residency._host["b"].bytes
    before = len(pretend.hub.fetched)
    pretend.run(request("a"))
    assert pretend.hub.fetched[before:] == ["a"]


def test_what_was_unloaded_while_it_was_fetched_is_not_kept(pretend: PretendEngine) -> None:
    gate = pretend.hub.slow["a"] = threading.Event()
    asked = request("a")
    pretend.submit(asked)
    pretend.wait(lambda: pretend.hub.fetched == ["a"])
    pretend.engine.cancel(asked.id)
    pretend.step()
    pretend.residency.unload("a")
    gate.set()
    pretend.wait(lambda: not pretend.residency._host_loader.fetching)
    assert pretend.residency.list() == []


def test_unloading_what_others_wait_for_does_not_lose_them(pretend: PretendEngine) -> None:
    holder = pretend.submit(request("a", "b", new=30))
    while not holder.deltas:
        pretend.step()
    waiting = pretend.submit(request("c"))
    pretend.wait(lambda: "c" in pretend.residency._host)
    pretend.residency.unload("c")
    pretend.finish(holder, waiting)
    assert waiting.error is None


def test_the_host_budget_never_takes_what_waits_to_be_placed() -> None:
    pretend = PretendEngine(adapters=2, host_adapter_memory_bytes=1)  # less than one adapter
    try:
        asked = [request(*names) for names in ("a", "bc", "d", "e", "fa", "g", "bd")]
        readers = pretend.run(*asked)
        assert [r.token_ids for r in readers] == [expected(one) for one in asked]
        assert pretend.residency._host == {}
        pretend.check_empty()
    finally:
        pretend.close()


def test_what_waits_for_rows_does_not_fill_host_memory() -> None:
    """Hundreds of adapters are asked for at once; only the host's budget and the fetches under way are held."""
    one = 4 * 4 * RANK
    pretend = PretendEngine(adapters=2, host_adapter_memory_bytes=4 * one, max_waiting_per_tenant=10_000)
    most = 0
    try:
        holder = pretend.submit(request("x", "y", new=200))
        while not holder.deltas:
            pretend.step()
        readers = [pretend.submit(request(f"a{i}", new=1)) for i in range(200)]
        for _ in range(100):
            pretend.step()
            most = max(most, pretend.residency._host.bytes)
        assert most <= (4 + 2 * 8 + 1) * one
        pretend.engine.cancel(pretend.scheduler.running[0].request.id)
        pretend.finish(*readers)
        pretend.check_empty()
    finally:
        pretend.close()


def test_closing_does_not_wait_for_a_hub_that_hangs() -> None:
    pretend = PretendEngine()
    gate = pretend.hub.slow["slow"] = threading.Event()
    ticket = pretend.residency.acquire(("slow",), ("t/slow@1",))
    pretend.wait(lambda: pretend.hub.fetched == ["slow"])
    pretend.close()
    assert ticket.error is not None
    gate.set()


def test_load_from_other_threads(pretend: PretendEngine) -> None:
    """Administrators load while requests run; every load ends, and nothing stays leased."""
    failed: list[BaseException] = []

    def load(name: str) -> None:
        try:
            for _ in range(20):
                assert pretend.residency.load(name, f"t/{name}@1").digest == name
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=load, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    readers = [pretend.submit(request(name)) for name in "dcba" * 3]
    pretend.finish(*readers)
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not failed


def test_the_copy_into_the_arena_is_charged_to_the_allowance_of_loads(
    pretend: PretendEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace, arena = pretend.residency._host_loader._pace, pretend.residency._arena
    before, write = pace._allowance, arena.write

    def slow(*given: Any) -> None:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        write(*given)

    monkeypatch.setattr(pace, "_share", 0.0)  # nothing is saved up meanwhile
    monkeypatch.setattr(arena, "write", slow)
    pretend.run(request("a"))
    assert pace._allowance < before - 0.05
