"""What callers cannot do to a server: hold its threads, fill its disk, outlive their checks, read its inner words."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from hub.adapter_dir import WEIGHTS_FILE
from hub.errors import FactsMalformed, Forbidden, HubUnavailable, QueryInvalid, RefInvalid, ServerBusy, UploadLost
from hub.hub import Hub
from hub.refs import Digest
from hub.registry.access import ServiceLimits
from hub.registry.server import RegistryConfig, RegistryServer
from hub.registry.uploads import Uploads
from hub.remote.address import Address
from hub.remote.cache import Cache
from hub.remote.connection import Connection
from hub.remote.remote_hub import RemoteHub
from hub.search import Query
from protos.loraplex.v1 import registry_pb2 as pb
from tests.hub.making import lora_tensors, write_adapter
from tests.hub.registry.conftest import ConnectAs
from tests.hub.registry.test_transfer import files_of, large_adapter, upload
from tests.waiting import eventually

MIB = 1024 * 1024


def digest_of(data: bytes) -> Digest:
    return Digest.of_hex(hashlib.sha256(data).hexdigest())


@pytest.fixture
def impatient(store: Hub, tmp_path: Path) -> Iterator[RemoteHub]:
    """A client without a token of a server that waits half a second for its callers and has one place of each kind."""
    limits = ServiceLimits(max_watches=1, max_transfers=1, max_checks=1)
    config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads", idle_seconds=0.5, limits=limits)
    with RegistryServer(store, None, config) as server:
        connection = Connection(Address.parse(f"grpc://{server.address}"), None, patience_seconds=5)
        with RemoteHub(connection, Cache(tmp_path / "client")) as hub:
            yield hub


def test_an_upload_that_stalls_gives_its_place_back(impatient: RemoteHub, tmp_path: Path) -> None:
    data = b"x" * 1000
    file = pb.PushedFile(name="README.md", sha256=digest_of(data), bytes=len(data))
    go_on = threading.Event()

    def stalling() -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(begin=pb.UploadRequest.Begin(ref="x", file=file))
        yield pb.UploadRequest(data=data[:10])
        go_on.wait(20)

    call = impatient.connection.stub.Upload.future(stalling())
    assert eventually(lambda: list((tmp_path / "uploads").glob("*/*.part")) != [])
    with pytest.raises(ServerBusy):
        upload(impatient, "README.md", b"other")
    with pytest.raises(grpc.RpcError):
        call.result(timeout=10)
    go_on.set()
    # What came before is kept: the caller goes on from there.
    begun = impatient.connection.call("BeginPush", pb.BeginPushRequest(ref="x", files=[file]))
    assert [each.offset for each in begun.missing] == [10]
    assert eventually(lambda: upload(impatient, "README.md", b"other") == 5)


def test_a_reader_that_stalls_gives_its_place_back(impatient: RemoteHub, store: Hub, tmp_path: Path) -> None:
    source = large_adapter(tmp_path / "a", 64)  # more than gRPC holds on its way
    version = store.push(source, "x").version
    request = pb.ReadFileRequest(digest=version.digest, filename=WEIGHTS_FILE)
    call = impatient.connection.stub.ReadFile(request)
    next(iter(call))
    with pytest.raises(ServerBusy):
        list(impatient.connection.stream("ReadFile", request))

    def free() -> bool:
        try:
            next(
                impatient.connection.stream(
                    "ReadFile", pb.ReadFileRequest(digest=version.digest, filename="adapter_config.json")
                )
            )
        except ServerBusy:
            return False
        return True

    assert eventually(free)
    with pytest.raises(grpc.RpcError):
        for _ in call:
            pass
    impatient.pull("x", tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(source)


def test_a_check_that_nobody_waits_for_ends_and_holds_its_place_until_then(
    impatient: RemoteHub, store: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.push(write_adapter(tmp_path / "a"), "x")
    running, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    real = Hub.verify

    def slow(self: Hub, ref: Any = None, progress: Any = None) -> Any:
        progress("verifying", 0, 2)
        running.set()
        go_on.wait(20)
        try:
            progress("verifying", 1, 2)
        finally:
            ended.set()
        return real(self, ref, progress)

    monkeypatch.setattr(Hub, "verify", slow)
    request = pb.CheckRequest(kind=pb.CheckRequest.KIND_VERIFY, ref="x")
    call = impatient.connection.stub.Check(request)
    assert running.wait(10)
    call.cancel()
    with pytest.raises(ServerBusy):  # the work goes on, unread
        impatient.verify("x")
    go_on.set()
    assert ended.wait(10)
    monkeypatch.setattr(Hub, "verify", real)
    assert eventually(lambda: not busy(impatient))


def busy(hub: RemoteHub) -> bool:
    try:
        hub.verify("x")
    except ServerBusy:
        return True
    return False


def test_uploads_at_once_stay_within_the_servers_room(tmp_path: Path) -> None:
    """Eight uploads of 1 MiB, room for three: what is promised to some is not promised to others."""
    uploads = Uploads(tmp_path / "uploads", max_staged_bytes=3 * (MIB + 4096))
    begun, go_on = threading.Semaphore(0), threading.Event()
    refused: list[ServerBusy] = []

    def one(number: int) -> None:
        data = bytes([number]) * MIB

        def chunks() -> Iterator[bytes]:
            begun.release()
            go_on.wait(20)
            yield data

        try:
            uploads.receive("ada", "README.md", digest_of(data), MIB, 0, chunks())
        except ServerBusy as error:
            refused.append(error)
            begun.release()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert begun.acquire(timeout=10)
    assert len(refused) == 5
    go_on.set()
    for thread in threads:
        thread.join()
    assert len([path for path in (tmp_path / "uploads").glob("*/*") if path.stat().st_size == MIB]) == 3
    with pytest.raises(ServerBusy):
        uploads.receive("ada", "README.md", digest_of(b"y"), MIB, 0, iter(()))


def test_empty_uploads_take_room_too(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "uploads", max_staged_bytes=20 * 4096)
    made = 0
    with pytest.raises(ServerBusy):
        for number in range(100):
            uploads.receive("ada", "README.md", digest_of(bytes([number])), 1, 0, iter(()))
            made += 1
    assert 10 <= made <= 20


def test_an_upload_that_announced_more_before_is_begun_anew(connect: ConnectAs, tmp_path: Path) -> None:
    hub = connect("*:push")
    source = write_adapter(tmp_path / "a")
    data = (source / "adapter_config.json").read_bytes()
    digest = digest_of(data)
    upload(hub, "adapter_config.json", data + b"more", digest=digest, size=len(data) + 100)  # cut, and too long
    assert hub.push(source, "x").created


def test_what_was_damaged_between_upload_and_publication_is_not_published(
    connect: ConnectAs, store: Hub, tmp_path: Path
) -> None:
    hub = connect("*:push")
    source = write_adapter(tmp_path / "a")
    files = []
    for path in source.iterdir():
        data = path.read_bytes()
        upload(hub, path.name, data)
        files.append(pb.PushedFile(name=path.name, sha256=digest_of(data), bytes=len(data)))
    [weights] = [path for path in (tmp_path / "uploads").glob("*/*") if path.stat().st_size > 2000]
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1  # another sound weight, of about the same size
    weights.write_bytes(data)
    with pytest.raises(UploadLost, match="damaged"):
        hub.connection.call("Publish", pb.PublishRequest(ref="x", files=files))
    assert store.last_seq() == 0
    assert hub.push(source, "x").created
    assert store.verify() == []


def test_a_damaged_file_of_the_hub_is_mended_by_a_push_over_the_wire(
    connect: ConnectAs, store: Hub, tmp_path: Path
) -> None:
    source = write_adapter(tmp_path / "a")
    version = store.push(source, "x").version
    entry = version.manifest.files[WEIGHTS_FILE]
    path = tmp_path / "hub" / "blobs" / "sha256" / entry.sha256.hex[:2] / entry.sha256.hex
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    pushed = connect("*:push").push(source, "x")
    assert (pushed.version, pushed.created) == (version, False)
    assert store.verify() == []


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 1e12])
def test_a_lease_without_a_real_end_is_refused(connect: ConnectAs, store: Hub, tmp_path: Path, seconds: float) -> None:
    store.push(write_adapter(tmp_path / "a"), "x")
    for hub in (connect("*:push"), store):
        with pytest.raises(QueryInvalid):
            hub.lease("x", "me", seconds)
    assert store.leases() == []


def test_readers_keep_what_they_use_for_a_while_and_cannot_touch_others_leases(
    connect: ConnectAs, store: Hub, tmp_path: Path
) -> None:
    store.push(write_adapter(tmp_path / "a"), "team/x")
    store.lease("team/x", "audit")
    reader, other = connect("team:read", subject="bob"), connect("team:read", subject="eve")
    assert reader.lease("team/x", "server-1", 600).holder == "server-1"
    with pytest.raises(Forbidden):
        reader.lease("team/x", "server-1")
    with pytest.raises(Forbidden):
        reader.lease("team/x", "server-1", 7200)
    with pytest.raises(Forbidden):
        connect("other:read").lease("team/x", "server-1", 600)
    reader.lease("team/x", "audit", 1)
    other.release("team/x", "server-1")
    other.release("team/x", "audit")
    held = {lease.holder: lease.expires for lease in store.leases()}
    assert held.keys() == {"audit", "server-1 (bob)", "audit (bob)"}
    assert held["audit"] is None
    reader.release("team/x", "server-1")
    assert "server-1 (bob)" not in {lease.holder for lease in store.leases()}


def test_a_database_that_fails_is_not_quoted_to_callers(
    connect: ConnectAs, store: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub = connect("*:read")
    said = 'connection to server at "db.internal" (10.0.0.5), port 5432 failed: password for user "hub"'

    def fail(*arguments: object) -> None:
        raise sa.exc.OperationalError("SELECT 1", {}, Exception(said))

    monkeypatch.setattr("hub.registry.tokens.asked", fail)
    with pytest.raises(HubUnavailable) as caught:
        hub.who_am_i()
    assert "tokens cannot be read" in str(caught.value)
    for secret in ("db.internal", "10.0.0.5", "SELECT"):
        assert secret not in str(caught.value)
    assert "db.internal" in caplog.text  # the operator is told


def test_what_people_will_read_is_a_line_of_text(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    hub = connect("*:push")
    source = write_adapter(tmp_path / "a")
    files = []
    for path in source.iterdir():
        upload(hub, path.name, path.read_bytes())
        files.append(pb.PushedFile(name=path.name, sha256=digest_of(path.read_bytes()), bytes=path.stat().st_size))

    def publish(**more: Any) -> None:
        hub.connection.call("Publish", pb.PublishRequest(ref="x", files=files, **more))

    for creator in ("a\nb", "\x1b[31mred", "x" * 501):
        with pytest.raises(FactsMalformed, match="creator"):
            publish(creator=creator)
    for base in ({"name": "\x1b]0;title\x07"}, {"revision": "a\0b"}, {"fingerprint": "sha256:../.."}):
        with pytest.raises((FactsMalformed, RefInvalid), match=r"base|digest"):
            publish(base=pb.BaseIdentity(**base))
    with pytest.raises(RefInvalid, match="at most"):
        publish(parents=["x@1"] * 101)
    assert store.last_seq() == 0
    publish(creator="ada")
    assert store.resolve("x").manifest.creator == "ada"


def test_lists_and_searches_of_many_that_the_caller_may_not_read_cost_few_queries(
    connect: ConnectAs, store: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(6):
        source = write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed))
        for name in ("aa", "hidden/x", "team/x"):
            store.push(source, name)
    asked = []
    real = Hub.search
    monkeypatch.setattr(Hub, "search", lambda self, query: asked.append(query) or real(self, query))
    reader = connect("team:read")
    assert [each.number for each in reader.search(Query(limit=1)).versions] == [1]
    assert len(asked) == 1
    page = reader.search(Query(limit=4))
    assert ([each.number for each in page.versions], page.more) == ([1, 2, 3, 4], True)
    rest = reader.search(Query(limit=4, after=("team/x", 4)))
    assert ([each.number for each in rest.versions], rest.more) == ([5, 6], False)
    monkeypatch.setattr("hub.remote.messages.MAX_PAGE", 4)
    assert [each.text for each in reader.versions()] == [f"team/x@{number}" for number in range(1, 7)]
    assert len(connect("*:read").versions()) == 18
