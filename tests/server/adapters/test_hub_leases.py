"""The leases a server takes: while it holds a version, and not longer; and what a hub that refuses does to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub.errors import Forbidden, HubUnavailable, VersionHeld
from hub.hub import Hub
from server.adapters.hub_leases import HubLeases
from tests.hub.making import lora_tensors, write_adapter
from tests.waiting import eventually


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub.open(str(tmp_path / "hub")) as opened:
        for seed in range(3):
            opened.push(write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)), "team/x")
        yield opened


def test_what_is_held_cannot_be_removed_and_what_left_can(hub: Hub) -> None:
    first, second, _ = (hub.resolve(f"team/x@{number}") for number in (1, 2, 3))
    held = {first.digest, second.digest}
    leases = HubLeases(hub, 60, look_seconds=0.02)
    try:
        leases.follow(lambda: held)
        leases.fetched("team/x", first.digest)
        leases.fetched("team/x", second.digest)
        assert eventually(lambda: len(hub.leases()) == 2)
        assert {lease.holder for lease in hub.leases()} == {leases.holder}
        assert all(55 < (lease.expires or 0) - time.time() <= 60 for lease in hub.leases())
        with pytest.raises(VersionHeld, match="hub serve on"):
            hub.remove("team/x@1")
        held.discard(first.digest)
        assert eventually(lambda: [lease.version for lease in hub.leases()] == [2])
        assert hub.remove("team/x@1").number == 1
    finally:
        leases.close()
    assert hub.leases() == []
    assert hub.remove("team/x@2").number == 2


def test_leases_are_renewed_while_held_and_run_out_when_a_server_dies(hub: Hub) -> None:
    version = hub.resolve("team/x@1")
    leases = HubLeases(hub, 3.0, look_seconds=0.02)
    leases.follow(lambda: {version.digest})
    leases.fetched("team/x", version.digest)
    assert eventually(lambda: len(hub.leases()) == 1)
    time.sleep(3.5)
    assert len(hub.leases()) == 1  # renewed meanwhile
    # A server that dies: nobody renews, and nobody gives back.
    leases._give_all_back = lambda: None  # type: ignore[method-assign]
    leases.close()
    assert len(hub.leases()) == 1
    assert eventually(lambda: hub.leases() == [])
    assert hub.remove("team/x@1").number == 1


def test_a_fetch_that_came_to_nothing_is_not_leased(hub: Hub) -> None:
    leases = HubLeases(hub, 60, look_seconds=0.02)
    try:
        leases.follow(lambda: set())
        leases.fetched("team/x", hub.resolve("team/x@1").digest)
        assert eventually(lambda: not leases._fetched)
        assert hub.leases() == []
    finally:
        leases.close()


def test_a_version_removed_before_its_lease_is_no_trouble(hub: Hub) -> None:
    digest = hub.resolve("team/x@1").digest
    hub.remove("team/x@1")
    other = hub.resolve("team/x@2").digest
    leases = HubLeases(hub, 60, look_seconds=0.02)
    try:
        leases.fetched("team/x", digest)
        leases.fetched("team/x", other)
        assert eventually(lambda: [lease.version for lease in hub.leases()] == [2])
    finally:
        leases.close()


@pytest.mark.parametrize("error", [HubUnavailable("away"), Forbidden("ada lacks the role 'read'")])
def test_a_hub_that_refuses_is_asked_again_later_and_told_of_once(
    hub: Hub, error: Exception, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = threading.Event()
    refusing.set()
    asked = []
    real = hub.lease

    def lease(*arguments: object) -> object:
        asked.append(arguments)
        if refusing.is_set():
            raise error
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(hub, "lease", lease)
    leases = HubLeases(hub, 1.0, look_seconds=0.02)
    try:
        leases.fetched("team/x", hub.resolve("team/x@1").digest)
        assert eventually(lambda: len(asked) >= 2)
        assert caplog.text.count("no leases from the hub") == 1
        refusing.clear()
        assert eventually(lambda: len(hub.leases()) == 1)
    finally:
        leases.close()
