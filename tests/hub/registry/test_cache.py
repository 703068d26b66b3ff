"""What goes on while the server is away, and what is said about it."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path

import pytest

from hub.errors import CredentialsUnsafe, HubUnavailable, Unauthenticated, VersionNotFound
from hub.hub import Hub
from hub.refs import AdapterRef
from hub.registry.server import RegistryConfig, RegistryServer
from hub.remote import credentials
from hub.remote.address import Address
from hub.remote.remote_hub import RemoteHub
from server.adapters.directory import AdapterDirectory, hub_fetch
from tests.hub.making import lora_tensors, write_adapter


def adapter(tmp_path: Path, seed: int) -> Path:
    return write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))


def serve(store: Hub, tmp_path: Path, listen: str = "127.0.0.1:0") -> RegistryServer:
    return RegistryServer(store, None, RegistryConfig(listen=listen, uploads=tmp_path / "uploads")).start()


def age(tmp_path: Path, seconds: float) -> None:
    for path in (tmp_path / "cache").rglob("known/*"):
        value = json.loads(path.read_text())
        path.write_text(json.dumps({**value, "time": value["time"] - seconds}))


def test_the_cache_goes_on_and_says_how_old_it_is(store: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (store.push(adapter(tmp_path, seed), "x").version for seed in (1, 2))
    server = serve(store, tmp_path)
    with RemoteHub.open(f"grpc://{server.address}") as hub:
        assert hub.resolve("x") == second
        hub.pull("x", tmp_path / "out")
        hub.resolve("x@1")
        server.stop(0)
        hub.connection.patience_seconds = 1
        age(tmp_path, 3 * 3600)
        with caplog.at_level(logging.WARNING):
            assert hub.resolve("x") == second
        assert "x:latest is x@2, as of 3 hours ago" in caplog.text
        assert hub.get(second.digest) == second
        assert hub.resolve("x@1") == first
        assert hub.read_file(second, "adapter_config.json")
        hub.pull("x", tmp_path / "again")
        for unknown in (lambda: hub.resolve("x:prod"), lambda: hub.aliases("x"), lambda: hub.versions()):
            with pytest.raises(HubUnavailable):
                unknown()
        with pytest.raises(HubUnavailable):
            hub.read_file(first, "adapter_model.safetensors")  # known, but its bytes never came
        age(tmp_path, 30 * 86400)
        with pytest.raises(HubUnavailable, match="too long"):
            hub.resolve("x")
        assert hub.resolve("x@1") == first, "a number never changes its meaning"
        anew = serve(store, tmp_path, server.address)
        store.remove("x@1")
        hub.connection.patience_seconds = 20
        hub.connection.persist(hub.who_am_i, lambda: 0)  # until it is connected again
        with pytest.raises(VersionNotFound):
            hub.resolve("x@1")  # the server's word goes before the cache
        anew.stop(0)


def test_a_damaged_cache_is_noticed_and_mended(store: Hub, tmp_path: Path) -> None:
    version = store.push(adapter(tmp_path, 1), "x").version
    server = serve(store, tmp_path)
    with RemoteHub.open(f"grpc://{server.address}") as hub:
        expected = hub.read_file(version, "adapter_model.safetensors")
        hex_digits = version.manifest.files["adapter_model.safetensors"].sha256.hex
        [cached] = (tmp_path / "cache").rglob(f"sha256/??/{hex_digits}")
        for act in (
            lambda: hub.read_file(version, "adapter_model.safetensors"),
            lambda: (hub.pull("x", tmp_path / "out"), (tmp_path / "out/adapter_model.safetensors").read_bytes())[1],
        ):
            cached.chmod(0o644)
            cached.write_bytes(b"damaged")
            assert act() == expected
    server.stop(0)


def test_the_inference_server_starts_and_follows_without_the_hub(store: Hub, tmp_path: Path) -> None:
    first = store.push(adapter(tmp_path, 1), "x").version
    server = serve(store, tmp_path)
    url = f"grpc://{server.address}"
    with RemoteHub.open(url) as hub:
        directory = AdapterDirectory(hub, poll_seconds=0.05)
        assert directory.resolve(AdapterRef.parse("x")).digest == first.digest
        hub_fetch(hub)(first.digest)
        directory.close()
    server.stop(0)
    with RemoteHub.open(url) as hub:
        directory = AdapterDirectory(hub, poll_seconds=0.05)  # the hub's server is away
        assert directory.resolve(AdapterRef.parse("x")).digest == first.digest
        assert hub_fetch(hub)(first.digest).weights
        second = store.push(adapter(tmp_path, 2), "x").version
        anew = serve(store, tmp_path, server.address)
        for _ in range(200):
            if directory.resolve(AdapterRef.parse("x")).digest == second.digest:
                break
            threading.Event().wait(0.05)
        assert directory.resolve(AdapterRef.parse("x")).digest == second.digest
        directory.close()
        anew.stop(0)


def test_tokens_are_kept_for_this_user_alone(tmp_path: Path) -> None:
    there = Address.parse("grpcs://hub.example.org")
    credentials.remember(there, "lpt_secret")
    assert credentials.credentials_file().stat().st_mode & 0o777 == 0o600
    assert credentials.token_for(there) == "lpt_secret"
    assert credentials.token_for(Address.parse("grpcs://hub.example.org:1")) is None
    credentials.credentials_file().chmod(0o640)
    with pytest.raises(CredentialsUnsafe, match="chmod 600"):
        credentials.token_for(there)


def test_a_token_comes_without_what_a_copy_brought_along(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Address.parse("grpcs://hub.example.org")
    monkeypatch.setenv("LORAPLEX_HUB_TOKEN", "lpt_secret\r\n")
    assert credentials.token_for(there) == "lpt_secret"
    for wrong in ("lpt_se\ncret", "lpt_sécret", "lpt_\x07"):
        monkeypatch.setenv("LORAPLEX_HUB_TOKEN", wrong)
        with pytest.raises(Unauthenticated, match="LORAPLEX_HUB_TOKEN has a character"):
            credentials.token_for(there)
    monkeypatch.delenv("LORAPLEX_HUB_TOKEN")
    credentials.remember(there, "lpt_sécret")
    with pytest.raises(Unauthenticated, match=r"kept for grpcs://hub\.example\.org:50052"):
        credentials.token_for(there)


def test_a_token_is_not_sent_in_the_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_HUB_TOKEN", "lpt_secret")
    for url in ("grpc://hub.example.org", "grpc://10.0.0.7:1", "grpc://127.0.0.1.example.org"):
        with pytest.raises(CredentialsUnsafe):
            RemoteHub.open(url)
    for url in ("grpc://localhost", "grpc://127.0.0.1:1", "grpc://[::1]:1", "grpc://10.0.0.7?plaintext-token=yes"):
        RemoteHub.open(url).close()


@pytest.mark.parametrize(
    "url",
    [
        "grpc://",
        "grpc://h/x",
        "grpc://u:p@h",
        "grpc://h:99999",
        "grpc://h?ca=x",
        "grpcs://h?plaintext-token=yes",
        "grpc://h?x",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(HubUnavailable):
        Address.parse(url)
