"""Bytes over the wire: cut and resumed, wrong, too many, and for many at once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hub.errors import AdapterRejected, BlobCorrupt, HubError, RefInvalid, UploadLost, UploadRefused
from hub.hub import Hub
from hub.registry.grants import Grant
from hub.registry.server import RegistryConfig, RegistryServer
from hub.registry.tokens import TokenStore
from hub.remote.address import Address
from hub.remote.cache import Cache
from hub.remote.connection import Connection
from hub.remote.remote_hub import RemoteHub
from protos.loraplex.v1 import registry_pb2 as pb
from tests.hub.making import f32, key, lora_tensors, write_adapter
from tests.hub.registry.conftest import ConnectAs
from tests.hub.registry.cutting import CuttingProxy
from tests.waiting import bytes_in

MIB = 1024 * 1024


def large_adapter(directory: Path, mebibytes: int = 12) -> Path:
    random = np.random.default_rng(int.from_bytes(os.urandom(4)))
    width = mebibytes * MIB // (2 * 4 * 8)
    tensors = {
        key("q_proj", "lora_A.weight"): f32(random.normal(size=(8, width)) * 0.01),
        key("q_proj", "lora_B.weight"): f32(random.normal(size=(width, 8)) * 0.01),
    }
    return write_adapter(directory, config={"r": 8, "target_modules": ["q_proj"]}, tensors=tensors)


def through(proxy: CuttingProxy, tokens: TokenStore, cache: Path) -> RemoteHub:
    _, text = tokens.create("ada", [Grant.parse("*:push")])
    return RemoteHub(Connection(Address.parse(f"grpc://{proxy.address}"), text, patience_seconds=20), Cache(cache))


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_transfer_that_is_cut_goes_on_where_it_was(
    direction: str, server: RegistryServer, tokens: TokenStore, store: Hub, tmp_path: Path
) -> None:
    source = large_adapter(tmp_path / "a", 24)
    size = (source / "adapter_model.safetensors").stat().st_size
    proxy = CuttingProxy(server.address, direction, after=10 * MIB, cuts=3)
    with through(proxy, tokens, tmp_path / "cache") as hub:
        if direction == "down":
            store.push(source, "x")
        else:
            assert hub.push(source, "x").created
        hub.pull("x", tmp_path / "out")
    proxy.close()
    assert proxy.done >= 2
    assert files_of(tmp_path / "out") == files_of(source)
    # What was under way at a cut comes again: gRPC holds 2 to 6 MiB for a reader that lags. From the beginning it would
    # be 10 MiB more for each cut.
    assert proxy.bytes[direction] < size + 8 * MIB * proxy.done, "bytes that had arrived came again"
    assert store.verify() == []


def test_a_push_goes_on_with_a_server_started_anew(store: Hub, tokens: TokenStore, tmp_path: Path) -> None:
    """What the first server took in is not sent to the second, which begins with the same directory."""
    source = large_adapter(tmp_path / "a")
    config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
    first = RegistryServer(store, None, config).start()

    def kept() -> int:
        return bytes_in(tmp_path / "uploads", "*/*.part")

    proxy = CuttingProxy(first.address, "up", after=6 * MIB, cuts=1, until=lambda: kept() >= 4 * MIB)
    address = Address.parse(f"grpc://{proxy.address}")
    with RemoteHub(Connection(address, None, patience_seconds=0), Cache(tmp_path / "c1"), actor="ada") as hub:
        with pytest.raises(HubError):
            hub.push(source, "x")
    first.stop(0)
    proxy.close()
    taken = kept()
    assert taken >= 4 * MIB
    with RegistryServer(store, None, config) as second:
        counting = CuttingProxy(second.address, "up", after=0, cuts=0)
        with RemoteHub(Connection(Address.parse(f"grpc://{counting.address}"), None), Cache(tmp_path / "c2")) as hub:
            assert hub.push(source, "x").created
        counting.close()
    size = (source / "adapter_model.safetensors").stat().st_size
    assert counting.bytes["up"] < size - taken + MIB
    assert store.verify() == []
    assert list((tmp_path / "uploads").glob("*/*")) == []


def test_known_files_are_not_sent_again(server: RegistryServer, tokens: TokenStore, tmp_path: Path) -> None:
    source = large_adapter(tmp_path / "a", 4)
    proxy = CuttingProxy(server.address, "up", after=0, cuts=0)
    with through(proxy, tokens, tmp_path / "cache") as hub:
        hub.push(source, "x")
        sent = proxy.bytes["up"]
        assert not hub.push(source, "x").created
        (source / "README.md").write_text("a card")
        assert hub.push(source, "x").version.number in (1, 2)
        assert proxy.bytes["up"] - sent < MIB
    proxy.close()


def upload(hub: RemoteHub, name: str, data: bytes, *, digest: str | None = None, size: int | None = None) -> int:
    file = pb.PushedFile(
        name=name,
        sha256=digest or "sha256:" + hashlib.sha256(data).hexdigest(),
        bytes=len(data) if size is None else size,
    )

    def parts() -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(begin=pb.UploadRequest.Begin(ref="x", file=file))
        yield pb.UploadRequest(data=data)

    return int(hub.connection.call("Upload", parts()).bytes)


def test_hostile_uploads(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    hub = connect("*:push")
    for name in ("../../etc/passwd", "/etc/passwd", "adapter_model.bin", "", "a\0b", "adapter_config.json/.."):
        with pytest.raises(UploadRefused, match="no file of an adapter"):
            upload(hub, name, b"x")
    with pytest.raises(UploadRefused, match="at most"):
        upload(hub, "README.md", b"x", size=2**40)
    with pytest.raises(UploadRefused, match="more bytes came"):
        upload(hub, "README.md", b"x" * 100, size=10)
    with pytest.raises(UploadRefused, match="are not sha256"):
        upload(hub, "README.md", b"x", digest="sha256:" + "0" * 64)
    with pytest.raises(RefInvalid):
        upload(hub, "README.md", b"x", digest="sha256:../../../../etc/passwd")
    with pytest.raises(RefInvalid, match="begins with"):
        hub.connection.call("Upload", iter([pb.UploadRequest(data=b"x")]))
    file = pb.PushedFile(name="README.md", sha256="sha256:" + "1" * 64, bytes=1)
    with pytest.raises(UploadLost):
        hub.connection.call("Publish", pb.PublishRequest(ref="x", files=[file]))
    with pytest.raises(RefInvalid, match="twice"):
        hub.connection.call("BeginPush", pb.BeginPushRequest(ref="x", files=[file, file]))
    with pytest.raises(HubError):  # larger than a message may be
        hub.connection.call("BeginPush", pb.BeginPushRequest(ref="x", files=[file] * 200_000))
    assert list((tmp_path / "uploads").rglob("*.part")) == []
    assert store.last_seq() == 0


def test_what_the_client_did_not_check_the_server_does(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    """A client of one's own can send anything: the server reads the files as any adapter is read."""
    hub = connect("*:push")
    tensors = lora_tensors()
    name = next(iter(tensors))
    tensors[name] = f32(np.full(tensors[name][1], np.nan))
    directory = write_adapter(tmp_path / "nan", tensors=tensors)
    files = []
    for path in directory.iterdir():
        upload(hub, path.name, path.read_bytes())
        digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        files.append(pb.PushedFile(name=path.name, sha256=digest, bytes=path.stat().st_size))
    for sent in (files, files[:1]):
        with pytest.raises(AdapterRejected) as refused:
            hub.connection.call("Publish", pb.PublishRequest(ref="x", files=sent))
        assert str(tmp_path) not in str(refused.value)
    assert store.last_seq() == 0


def test_damage_on_the_server_is_never_handed_on(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    version = store.push(write_adapter(tmp_path / "a"), "x").version
    entry = version.manifest.files["adapter_model.safetensors"]
    path = tmp_path / "hub" / "blobs" / "sha256" / entry.sha256.hex[:2] / entry.sha256.hex
    sound = path.read_bytes()
    for damaged in (sound[:-1], sound + b"x", bytes([sound[0] ^ 1]) + sound[1:]):
        path.chmod(0o644)
        path.write_bytes(damaged)
        with pytest.raises(BlobCorrupt):
            connect("*:read").pull("x", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_32_clients_resolve_and_pull_while_an_alias_moves(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    versions = [
        store.push(write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)), "x").version
        for seed in range(3)
    ]
    clients = [connect("*:read") for _ in range(32)]
    digests = {version.number: version.digest for version in versions}

    def work(number: int) -> None:
        hub = clients[number]
        for turn in range(10):
            found = hub.resolve("x:latest")
            assert digests[found.number] == found.digest
            assert hub.resolve(f"x@{turn % 3 + 1}").digest == digests[turn % 3 + 1]
        hub.pull("x@2", tmp_path / f"out-{number}")

    with ThreadPoolExecutor(33) as pool:
        results = [pool.submit(work, number) for number in range(32)]
        for turn in range(20):
            store.tag(f"x@{turn % 3 + 1}", "latest")
        for result in results:
            result.result()
    expected = files_of(tmp_path / "a1")
    assert all(files_of(tmp_path / f"out-{number}") == expected for number in range(32))
