"""Adapters.List, Load and Unload."""

import pytest

from server.client import Client, GenerationError
from tests.server.api.fakes import FakeEngine, FakeHub, FakeStatus, Tier


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
