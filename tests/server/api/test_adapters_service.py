"""Adapters.List, Load and Unload."""

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from protos.loraplex.v1 import adapters_pb2
from server.adapters.directory import ResolvedAdapter
from server.api.grpc_service import MAX_WAITING_LOADS, AdaptersService
from server.client import Client, GenerationError
from server.errors import QueueFull
from tests.server.api.fakes import FakeEngine, FakeHub, FakeStatus, Tier
from tests.server.engine.pretend import PretendEngine, request


def test_load_is_idempotent_and_list_shows_it(client: Client, fake_hub: FakeHub) -> None:
    held = client.load("team/a:prod")
    assert (held.version, held.digest, held.tier) == ("team/a@1", fake_hub.versions["team/a"][0], "device")
    assert client.load("team/a@1") == held
    assert client.adapters() == [held]


def test_unload_says_whether_the_memory_is_free(client: Client, engine: FakeEngine) -> None:
    digest = client.load("team/a").digest
    engine.adapters.used.add(digest)
    assert client.unload("team/a") is False
    assert [each.draining for each in client.adapters()] == [True]
    engine.adapters.used.clear()
    assert client.unload("team/a@2") is True
    assert client.adapters() == []


def test_list_puts_what_is_on_the_device_first_and_names_what_the_engine_cannot(
    client: Client, engine: FakeEngine, fake_hub: FakeHub
) -> None:
    nameless = fake_hub.versions["team/a"][0]
    engine.adapters.held = {
        nameless: FakeStatus(nameless, "", Tier.HOST),
        "sha256:2": FakeStatus("sha256:2", "z@1"),
        "sha256:3": FakeStatus("sha256:3", "b@1", Tier.LOADING),
    }
    client.generate("x", adapters="team/a:prod", max_new_tokens=1)
    assert [(each.version, each.tier) for each in client.adapters()] == [
        ("z@1", "device"),
        ("team/a@1", "host"),
        ("b@1", "loading"),
    ]


@pytest.mark.parametrize(
    ("ref", "status", "reason"),
    [("team/nobody", "NOT_FOUND", "ADAPTER_NOT_FOUND"), ("../x", "INVALID_ARGUMENT", "REF_INVALID")],
)
def test_refusals(client: Client, ref: str, status: str, reason: str) -> None:
    for call in (client.load, client.unload):
        with pytest.raises(GenerationError) as refused:
            call(ref)
        assert (refused.value.status, refused.value.reason) == (status, reason)


def test_a_load_whose_caller_went_away_keeps_neither_place_nor_thread() -> None:
    pretend = PretendEngine(adapters=16)
    pretend.run(request("here"))
    slow = [f"slow{i}" for i in range(MAX_WAITING_LOADS)]
    pretend.hub.slow = {name: threading.Event() for name in slow}
    directory: Any = SimpleNamespace(
        cached=lambda ref: ResolvedAdapter(f"{ref.full_name}@1", ref.full_name), version_of=lambda digest: None
    )
    service = AdaptersService(pretend.engine, directory)
    context: Any = None

    async def load(name: str) -> str:
        answer = await asyncio.wait_for(service.Load(adapters_pb2.LoadAdapterRequest(ref=name), context), 10)
        return str(answer.adapter.version)

    async def calls() -> None:
        waiting = [asyncio.create_task(load(name)) for name in slow]
        while service._waiting < MAX_WAITING_LOADS:
            await asyncio.sleep(0)
        assert await load("here") == "t/here@1"
        with pytest.raises(QueueFull, match="are already waiting"):
            await load("other")
        for task in waiting:
            task.cancel()
        assert all(
            isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*waiting, return_exceptions=True)
        )
        assert not pretend.residency._claims.queue
        for gate in pretend.hub.slow.values():
            gate.set()
        assert await load("other") == "other@1"

    try:
        asyncio.run(calls())
        pretend.check_empty()
    finally:
        for gate in pretend.hub.slow.values():
            gate.set()
        service.close()
        pretend.close()
