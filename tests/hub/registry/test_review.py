"""Defects that a review of the client found, each with what it did before."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hub.errors import AdapterChanged, BlobCorrupt, HubUnavailable, NotCached, TargetNotEmpty, VersionNotFound
from hub.full_write import write_all
from hub.hub import Hub
from hub.offline import OfflineHub
from hub.pull import write_directory
from hub.refs import AdapterRef, Digest
from hub.registry.server import RegistryConfig, RegistryServer
from hub.remote import transfer
from hub.remote.cache import Cache, Known
from hub.remote.connection import CHUNK_BYTES, ServerAway
from hub.remote.remote_hub import RemoteHub
from hub.versions import Version
from protos.loraplex.v1 import registry_pb2 as pb
from tests.hub.making import lora_tensors, write_adapter
from tests.hub.registry.conftest import ConnectAs


def adapter(tmp_path: Path, seed: int) -> Path:
    return write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))


def test_a_file_that_vanishes_while_it_is_sent_is_not_a_broken_connection(
    connect: ConnectAs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC told the client's own OSError as UNKNOWN: it was tried for 30 s and then the server was "away"."""
    source = adapter(tmp_path, 1)
    hub = connect("*:push")
    send = transfer._send

    def vanish(connection: Any, path: Path, *more: Any) -> None:
        path.unlink()
        send(connection, path, *more)

    monkeypatch.setattr(transfer, "_send", vanish)
    begun = time.monotonic()
    with pytest.raises(AdapterChanged, match="cannot be read any more"):
        hub.push(source, "x")
    assert time.monotonic() - begun < 15


def test_a_blob_the_server_lost_is_damage_as_it_is_locally(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    """It was BLOB_NOT_FOUND from a shared hub and BLOB_CORRUPT from one in a directory."""
    version = store.push(adapter(tmp_path, 1), "x").version
    digits = version.manifest.files["adapter_model.safetensors"].sha256.hex
    (tmp_path / "hub" / "blobs" / "sha256" / digits[:2] / digits).unlink()
    with pytest.raises(BlobCorrupt, match=r"adapter_model\.safetensors of x@1 is missing"):
        connect("*:read").pull("x", tmp_path / "out")
    with pytest.raises(BlobCorrupt):
        connect("*:read").read_file(version, "adapter_model.safetensors")


def test_a_write_that_takes_only_some_is_gone_on_with() -> None:
    """Raw files may take less than they are given, as at the end of a disk: what followed stood in the wrong place."""

    class Short:
        def __init__(self) -> None:
            self.taken = b""

        def write(self, data: memoryview) -> int:
            self.taken += bytes(data[:3])
            return min(3, len(data))

    file: Any = Short()
    write_all(file, b"0123456789")
    assert file.taken == b"0123456789"


def test_sending_the_same_bytes_again_and_again_is_no_progress(tmp_path: Path) -> None:
    """Bytes sent counted as progress, also when none arrived: a line that always breaks was tried without end."""

    class Dead:
        patience_seconds = 0.3
        calls = 0

        def call(self, method: str, request: Any, actor: str | None = None, seconds: float | None = None) -> Any:
            if method == "BeginPush":
                return pb.BeginPushResponse(missing=[pb.BeginPushResponse.Missing(name="README.md", offset=0)])
            type(self).calls += 1
            for count, _ in enumerate(request):
                if count == self.calls % 3 + 1:
                    break
            raise ServerAway("cut")

        def call_that_ends(self, method: str, request: Any, actor: str | None, stop: object) -> Any:
            return self.call(method, request, actor)

        def persist(self, attempt: Callable[[], Any], progress: Callable[[], int]) -> Any:
            from hub.remote.connection import Connection

            return Connection.persist(self, attempt, progress)  # type: ignore[arg-type]

    (tmp_path / "README.md").write_bytes(os.urandom(5 * CHUNK_BYTES))
    from hub.adapter_dir import AdapterFile

    file = AdapterFile("README.md", 5 * CHUNK_BYTES, Digest.parse("sha256:" + "0" * 64))
    begun = time.monotonic()
    with pytest.raises(ServerAway):
        transfer.upload(Dead(), tmp_path, [file], "x", None, None)  # type: ignore[arg-type]
    assert time.monotonic() - begun < 15


def test_a_push_is_not_acknowledged_for_other_bytes(
    connect: ConnectAs, store: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever version the server answered was taken for the one that was pushed."""
    other = store.push(adapter(tmp_path, 2), "x")
    monkeypatch.setattr(Hub, "publish", lambda *a, **k: other)
    hub = connect("*:push")
    with pytest.raises(BlobCorrupt, match="does not hold what was pushed"):
        hub.push(adapter(tmp_path, 1), "x")
    with pytest.raises(BlobCorrupt, match="does not hold what was pushed"):
        hub.push(adapter(tmp_path, 2), "y")


def test_a_damaged_manifest_in_the_cache_comes_back(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    """It was never written again, as a blob of its name was there: the cache had lost that version for good."""
    version = store.push(adapter(tmp_path, 1), "x").version
    hub = connect("*:read")
    hub.resolve("x")
    cache = Cache(tmp_path / "client-1")
    path = tmp_path / "client-1" / "blobs" / "sha256" / version.digest.hex[:2] / version.digest.hex
    path.chmod(0o644)
    path.write_bytes(b"{}")
    assert cache.recall("x:latest") is None
    hub.resolve("x")
    assert cache.recall("x:latest") is not None


def test_what_the_server_forgot_is_forgotten(store: Hub, tmp_path: Path) -> None:
    """Nobody called `forget`: with the server away, an alias that it had just called unknown resolved again."""
    store.push(adapter(tmp_path, 1), "x")
    store.tag("x@1", "prod")
    server = RegistryServer(store, None, RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")).start()
    with RemoteHub.open(f"grpc://{server.address}") as hub:
        hub.resolve("x:prod")
        store.untag("x", "prod")
        with pytest.raises(Exception, match="no alias"):
            hub.resolve("x:prod")
        server.stop(0)
        with pytest.raises(HubUnavailable):
            hub.resolve("x:prod")


def test_a_version_that_was_removed_is_forgotten_too(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    first = store.push(adapter(tmp_path, 1), "x").version
    store.push(adapter(tmp_path, 2), "x")
    hub = connect("*:read")
    hub.get(first.digest)
    store.remove("x@1")
    with pytest.raises(VersionNotFound):
        hub.get(first.digest)
    assert Cache(tmp_path / "client-1").recall(first.digest) is None


def version_of(store: Hub, tmp_path: Path) -> Version:
    return store.push(adapter(tmp_path, 1), "x").version


def test_a_cache_that_cannot_be_written_does_not_stop_an_answer(
    connect: ConnectAs, store: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk under the cache made every `resolve` fail, though the server had answered."""
    version = version_of(store, tmp_path)
    hub = connect("*:read")

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hub.remote.cache.Path.write_text", full)
    with caplog.at_level(logging.WARNING):
        assert hub.resolve("x") == version
        assert hub.resolve("x@1") == version
    assert caplog.text.count("No space left") == 1, "said once"


def test_the_cache_forgets_names_and_leavings(store: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for each name ever asked (with a key: each user), and downloads of killed processes, stayed for good."""
    monkeypatch.setattr("hub.remote.cache.MAX_KNOWN", 50)
    monkeypatch.setattr("hub.remote.cache._PRUNE_EVERY", 10)
    version = version_of(store, tmp_path)
    cache = Cache(tmp_path / "cache-1")
    for user in range(200):
        cache.remember(f"x:prod for {user}", version, 1)
    assert len(list((tmp_path / "cache-1" / "known").iterdir())) <= 60
    assert cache.recall("x:prod for 199") is not None
    partial = tmp_path / "cache-1" / "partial"
    for name, age in (("0" * 64, 3), ("1" * 64 + ".beside", 3), ("2" * 64, 0)):
        (partial / name).write_bytes(b"x")
        then = time.time() - age * 86400
        os.utime(partial / name, (then, then))
    cache.trim(frozenset())
    assert [path.name for path in partial.iterdir()] == ["2" * 64]


def test_the_cache_is_listed_only_when_something_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file read from a warm cache listed and stat'ed the whole of it."""
    cache = Cache(tmp_path / "c")
    cache.trim(frozenset())
    monkeypatch.setattr(cache.blobs, "digests", lambda: pytest.fail("listed again"))
    cache.trim(frozenset())


@pytest.mark.parametrize("wrong", [{"digest": 3}, {"seq": "x"}, {"time": None}, {"name": ["x"]}])
def test_a_known_file_with_other_things_in_it_is_no_crash(wrong: dict[str, Any], store: Hub, tmp_path: Path) -> None:
    version = version_of(store, tmp_path)
    cache = Cache(tmp_path / "c")
    cache.remember("x", version, 7)
    [path] = (tmp_path / "c" / "known").iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    assert cache.recall("x") is None
    assert cache.oldest_seq() is None
    assert Known.__dataclass_fields__.keys() == json.loads(path.read_text()).keys()


def with_file(version: Version, name: str) -> Version:
    """The version with one file more, as somebody may tell it who made its manifest himself."""
    files = version.manifest.files
    manifest = replace(version.manifest, files={name: files["adapter_model.safetensors"], **files})
    return replace(version, digest=manifest.digest, manifest=manifest)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_server_cannot_have_a_file_written_outside_the_directory(
    connect: ConnectAs, store: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    """A manifest's file names were taken as they came: a server or its administrator chose what a pull overwrote."""
    for name in ("honest", "x"):
        store.push(adapter(tmp_path, 1), name)
    hub = connect("*:read")
    hub.pull("honest", tmp_path / "honest")  # the bytes are in the cache, so that only their name is new
    escaped = tmp_path / "escaped.txt"
    evil = with_file(store.resolve("x"), str(escaped) if absolute else "../escaped.txt")
    told, seq = store.entries.resolve_at(AdapterRef.parse("x"), None)
    told = replace(told, digest=evil.digest, manifest=evil.manifest.canonical())
    monkeypatch.setattr(store.entries, "resolve_at", lambda ref, key: (told, seq))
    with pytest.raises(BlobCorrupt, match=r"escaped\.txt', which no adapter has"):
        hub.pull("x", tmp_path / "out")
    with pytest.raises(BlobCorrupt, match=r"escaped\.txt', which is no plain file name"):
        write_directory(store.storage, evil, tmp_path / "out", None)
    assert not escaped.exists() and not (tmp_path / "out").exists()


def test_a_cache_cannot_have_a_file_written_outside_the_directory(store: Hub, tmp_path: Path) -> None:
    """What an earlier release kept of such a server's answer is not believed offline either."""
    evil = with_file(version_of(store, tmp_path), "../escaped.txt")
    cache = Cache(tmp_path / "c")
    for entry in evil.manifest.files.values():
        with store.storage.open(entry.sha256) as file:
            cache.blobs.put(file)
    cache.remember("x:latest", evil, 7)
    with pytest.raises(NotCached):
        OfflineHub(cache, "grpc://h").pull("x", tmp_path / "out")
    assert not (tmp_path / "escaped.txt").exists() and not (tmp_path / "out").exists()


def test_only_a_full_directory_is_called_full(store: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any failure of the last step, such as no permission, was told as a directory filled by somebody else."""
    version = version_of(store, tmp_path)

    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(HubUnavailable, match="Permission denied"):
        write_directory(store.storage, version, tmp_path / "out", None)

    def filled(source: Path, target: Path) -> None:
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(Path, "rename", filled)
    with pytest.raises(TargetNotEmpty):
        write_directory(store.storage, version, tmp_path / "out", None)


def test_a_disk_that_fails_is_told_by_has_too(store: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """`has` let the operating system's error through, with the store's path in it."""

    def fail(path: Path) -> bool:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(Path, "is_file", fail)
    with pytest.raises(HubUnavailable) as refused:
        store.storage.has(Digest.parse("sha256:" + "0" * 64))
    assert "sha256" not in str(refused.value)
