"""`--offline`: what is on this machine and verified, and no packet sent."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub.errors import HubError, NotCached
from hub.hub import Hub
from hub.offline import open_offline
from hub.registry.server import RegistryConfig, RegistryServer
from hub.remote.remote_hub import RemoteHub
from hub.signing import keys
from hub.signing.pushing import sign_version
from hub.signing.requiring import requiring
from tests.hub.making import lora_tensors, write_adapter


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever opens a connection fails the test; gRPC's own sockets are seen to by closing the server."""

    def refuse(*arguments: object) -> None:
        pytest.fail("something was sent")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield


def adapter(tmp_path: Path, seed: int) -> Path:
    return write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """A shared hub that served x@1 (signed) and x@2 to this machine's cache once, and is gone."""
    ada = keys.generate(tmp_path / "ada.key")
    with Hub.open(str(tmp_path / "hub")) as store:
        first = store.push(adapter(tmp_path, 1), "x").version
        store.push(adapter(tmp_path, 2), "x")
        store.push(adapter(tmp_path, 3), "y")
        store.tag("x@1", "prod")
        sign_version(store, first, ada)
        config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
        with RegistryServer(store, None, config) as server:
            address = f"grpc://{server.address}"
            with RemoteHub.open(address) as hub:
                requiring(hub, [tmp_path / "ada.key.pub"]).pull("x:prod", tmp_path / "first")
                hub.pull("x", tmp_path / "second")
                hub.resolve("y")
    yield address


def test_what_was_pulled_once_can_be_pulled(url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_offline(url) as hub:
        with caplog.at_level(logging.WARNING):
            assert hub.pull("x:prod", tmp_path / "a").text == "x@1"
        assert "x:prod is x@1, as of 0 seconds ago" in caplog.text
        assert files_of(tmp_path / "a") == files_of(tmp_path / "adapter-1")
        assert hub.pull("x@2", tmp_path / "b").text == "x@2", "asked for by an alias, named by its number"
        digest = hub.resolve("x@1").digest
        assert hub.pull(f"x@{digest}", tmp_path / "c").number == 1
        assert hub.read_file(digest, "adapter_config.json") == (tmp_path / "a" / "adapter_config.json").read_bytes()
        assert requiring(hub, [tmp_path / "ada.key.pub"]).pull("x@1", tmp_path / "d").number == 1


def test_what_is_missing_is_named(url: str, tmp_path: Path) -> None:
    with open_offline(url) as hub:
        for refused, named in (
            ("y", "adapter_model.safetensors missing"),
            ("x:canary", "x:canary"),
            ("x@3", "x@3"),
            ("z", "z:latest"),
            ("y@sha256:" + "0" * 64, "y@sha256:0000"),
        ):
            with pytest.raises(NotCached, match=named) as error:
                hub.pull(refused, tmp_path / "out")
            assert error.value.reason == "NOT_CACHED"
            assert not (tmp_path / "out").exists()
        with pytest.raises(NotCached, match="signatures"):
            requiring(hub, [tmp_path / "ada.key.pub"]).pull("x@2", tmp_path / "out")


def test_a_copy_that_was_damaged_is_not_given_out(url: str, tmp_path: Path) -> None:
    with open_offline(url) as hub:
        version = hub.resolve("x@1")
        weights = version.manifest.files["adapter_model.safetensors"].sha256.hex
        [cached] = (tmp_path / "cache").rglob(f"sha256/??/{weights}")
        cached.chmod(0o644)
        cached.write_bytes(bytes(cached.stat().st_size))
        with pytest.raises(NotCached, match=r"was damaged and is dropped, adapter_model.safetensors"):
            hub.pull("x@1", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        with pytest.raises(NotCached, match=r"adapter_model.safetensors missing"):
            hub.pull("x@1", tmp_path / "out")


def test_a_hub_in_a_directory_is_all_there(tmp_path: Path, no_network: None) -> None:
    url = str(tmp_path / "hub")
    with Hub.open(url) as hub:
        hub.push(adapter(tmp_path, 1), "x")
    with open_offline(url) as offline:
        assert offline.pull("x", tmp_path / "out").number == 1
    with pytest.raises(HubError) as refused:
        open_offline(str(tmp_path / "nothing"))
    assert refused.value.reason == "HUB_NOT_FOUND"
    with pytest.raises(NotCached, match="PostgreSQL"):
        open_offline(f"postgresql://hub@db.example/hub?blobs={tmp_path}/blobs")


def test_a_hub_with_its_files_in_s3_needs_no_bucket(
    tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Hub.open(f"file://{tmp_path / 'hub'}?blobs={s3_url}") as hub:
        hub.push(adapter(tmp_path, 1), "x")
        hub.push(adapter(tmp_path, 2), "x")
        hub.pull("x@1", tmp_path / "first")
    monkeypatch.setattr("obstore.get", lambda *a, **k: pytest.fail("the bucket was asked"))
    monkeypatch.setattr("obstore.head", lambda *a, **k: pytest.fail("the bucket was asked"))
    with open_offline(str(tmp_path / "hub")) as offline:
        assert offline.pull("x@1", tmp_path / "out").number == 1
        assert files_of(tmp_path / "out") == files_of(tmp_path / "adapter-1")
        with pytest.raises(NotCached, match=r"adapter_model.safetensors of x@2"):
            offline.pull("x@2", tmp_path / "again")
