"""The contracts of `hub.blobs.BlobStore` and `hub.journal.Journal`; every storage engine is to pass them."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.blobs import BlobStore
from hub.blobs.bucket import Bucket
from hub.blobs.cached import CachedBlobStore
from hub.blobs.local import LocalBlobStore
from hub.blobs.s3 import S3BlobStore
from hub.errors import BlobCorrupt, BlobNotFound, BlobsSwept, HubUnavailable, RefInvalid
from hub.journal import Journal, decode, encode
from hub.local_journal import LocalJournal
from hub.refs import Digest
from hub.s3_journal import S3Journal
from hub.versions import Event

LARGE = 6 * 1024 * 1024  # beyond what the S3 store is told to put in one request


@pytest.fixture(params=["local", "s3", "s3-cached"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """A new store, of one kind after the other."""
    if request.param == "local":
        return LocalBlobStore(tmp_path / "blobs")
    bucket = Bucket.parse(request.getfixturevalue("s3_url"))
    far = S3BlobStore(bucket, single_bytes=5 * 1024 * 1024, part_bytes=5 * 1024 * 1024)
    return far if request.param == "s3" else CachedBlobStore(far, tmp_path / "cached")


def read(store: BlobStore, digest: Digest) -> bytes:
    with store.open(digest) as file:
        return file.read()


@pytest.mark.parametrize("data", [b"", b"x", b"many" * 1_000_000, b"large" * LARGE])
def test_what_is_put_can_be_read_under_its_sha256(store: BlobStore, data: bytes) -> None:
    digest, size = store.put(io.BytesIO(data))
    assert digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert (size, read(store, digest), store.has(digest), list(store.digests())) == (len(data), data, True, [digest])
    assert list(store.infos()) == [(digest, store.info(digest))]
    assert read(store.stored(), digest) == data
    assert list(store.unfinished()) == []


def test_a_file_that_is_kept_is_read_under_its_digest(store: BlobStore, tmp_path: Path) -> None:
    path = tmp_path / "a file"
    path.write_bytes(b"bytes")
    os.utime(path, (0, 0))
    digest = Digest.of_hex(hashlib.sha256(b"bytes").hexdigest())
    assert store.put_file(path, digest) == digest
    assert store.put_file(path, digest) == digest
    assert read(store, digest) == b"bytes"
    assert abs(store.info(digest).modified - time.time()) < 60, "a sweep that spares the young took it"
    assert list(store.unfinished()) == []


def test_a_file_on_the_same_file_system_becomes_the_blob_itself(tmp_path: Path) -> None:
    store, path = LocalBlobStore(tmp_path / "blobs"), tmp_path / "a file"
    path.write_bytes(b"bytes")
    path.chmod(0o600)
    digest = Digest.of_hex(hashlib.sha256(b"bytes").hexdigest())
    assert store.flush_file(path)
    store.put_file(path, digest)
    blob = next((tmp_path / "blobs" / "sha256").glob("*/*"))
    assert blob.samefile(path)
    assert blob.stat().st_mode & 0o777 == 0o400, "written no more, and read by nobody who could not before"
    blob.chmod(0o644)
    blob.write_bytes(b"damaged")
    path.unlink()
    path.write_bytes(b"bytes")
    store.put_file(path, digest)
    assert read(store, digest) == b"bytes"


def test_a_file_that_no_link_reaches_is_copied_and_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, path = LocalBlobStore(tmp_path / "blobs"), tmp_path / "a file"
    path.write_bytes(b"bytes")
    link = os.link

    def refuse(source: Path, target: Path) -> None:
        if source == path:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", refuse)
    other = Digest.of_hex(hashlib.sha256(b"other bytes").hexdigest())
    digest = store.put_file(path, other)
    assert digest != other, "its own bytes say what it is"
    path.unlink()
    assert read(store, digest) == b"bytes"
    assert not store.has(other)


def test_an_absent_blob_is_not_found(store: BlobStore) -> None:
    absent = Digest.of_hex("0" * 64)
    assert not store.has(absent)
    with pytest.raises(BlobNotFound):
        store.open(absent)
    with pytest.raises(BlobNotFound):
        store.info(absent)
    store.delete(absent)


def test_no_name_but_a_digest_reaches_the_storage(store: BlobStore) -> None:
    for text in ("sha256:../../etc/passwd", "sha256:" + "0" * 63 + "/", "md5:0"):
        for reach in (store.open, store.info, store.delete, store.has):
            with pytest.raises(RefInvalid):
                reach(Digest(text))


def test_the_same_bytes_from_many_threads_are_one_blob(store: BlobStore) -> None:
    found: list[Digest] = []
    threads = [
        threading.Thread(target=lambda: found.append(store.put(io.BytesIO(b"same" * 9999))[0])) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert list(store.digests()) == [found[0]]


class Failing(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise OSError(5, "Input/output error")
        return super().read(3)


def test_a_put_that_fails_leaves_nothing(store: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(HubUnavailable) as caught:
        store.put(Failing(b"abcdef"))
    assert str(tmp_path) not in str(caught.value)
    assert list(store.digests()) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("damage", [b"", b"x", b"goof"])
def test_putting_again_mends_a_damaged_copy(tmp_path: Path, damage: bytes) -> None:
    store = LocalBlobStore(tmp_path / "blobs")
    digest, _ = store.put(io.BytesIO(b"good"))
    path = next((tmp_path / "blobs" / "sha256").glob("*/*"))
    path.chmod(0o644)
    path.write_bytes(damage)
    store.put(io.BytesIO(b"good"))
    assert read(store, digest) == b"good"


def test_blobs_are_written_read_only(tmp_path: Path) -> None:
    LocalBlobStore(tmp_path).put(io.BytesIO(b"x"))
    assert next((tmp_path / "sha256").glob("*/*")).stat().st_mode & 0o222 == 0


def test_a_deleted_blob_is_gone_for_new_readers_and_can_be_put_again(store: BlobStore) -> None:
    digest, _ = store.put(io.BytesIO(b"bytes"))
    other, _ = store.put(io.BytesIO(b"others"))
    assert store.info(digest).bytes == 5
    assert abs(store.info(digest).modified - time.time()) < 60
    with store.open(digest) as file:
        store.delete(digest)
        assert file.read() == b"bytes"
    assert list(store.digests()) == [other]
    assert store.put(io.BytesIO(b"bytes")) == (digest, 5)
    assert read(store, digest) == b"bytes"


def test_an_unfinished_large_put_can_be_seen_and_discarded_and_then_leaves_nothing(store: BlobStore) -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            data = super().read(size)
            for found in store.unfinished():
                store.discard(found)
                store.discard(found)
            return data

    with pytest.raises(BlobsSwept):
        store.put(Slow(random.randbytes(LARGE)))
    assert list(store.digests()) == list(store.unfinished()) == []


@pytest.fixture(params=["local", "s3"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Journal:
    """A new journal, of one kind after the other."""
    if request.param == "local":
        return LocalJournal(tmp_path / "journal")
    return S3Journal(Bucket.parse(request.getfixturevalue("s3_url")))


def test_a_record_is_there_once_and_never_changes(journal: Journal) -> None:
    assert not journal.has(1)
    assert list(journal.read()) == []
    records = {number: encode([event(number)]) for number in (1, 2, 999, 1000, 123_456)}
    for number in (1000, 1, 123_456, 2, 999):
        journal.put(number, records[number])
        journal.put(number, records[number])
        assert journal.has(number)
    assert list(journal.read()) == sorted(records.items())
    with pytest.raises(HubUnavailable, match="another story"):
        journal.put(2, encode([event(2, "mallory")]))
    assert dict(journal.read()) == records


def test_a_damaged_record_is_mended_by_writing_it_again(tmp_path: Path) -> None:
    journal = LocalJournal(tmp_path / "journal")
    journal.put(1, encode([event(1)]))
    path = next((tmp_path / "journal").rglob("*.json"))
    path.write_bytes(path.read_bytes()[:-9])
    journal.put(1, encode([event(1)]))
    assert decode(1, next(journal.read())[1]) == [event(1)]


@given(st.integers(0, 500), st.integers(0, 7))
def test_every_flipped_bit_of_a_record_is_noticed(position: int, bit: int) -> None:
    record = bytearray(encode([event(1)]))
    record[position % len(record)] ^= 1 << bit
    with pytest.raises(BlobCorrupt):
        decode(1, bytes(record))
    with pytest.raises(BlobCorrupt):
        decode(2, encode([event(1)]))


def event(seq: int, actor: str | None = None) -> Event:
    digest = Digest.of_hex("0" * 64)
    return Event(seq, "tag", "x", "prod", 1, digest, "t", actor, ((1, 1),), ((1, 2), (3, 4)), None, seq)


@pytest.mark.parametrize("walk", [LocalBlobStore.digests, LocalBlobStore.unfinished])
def test_blobs_that_may_not_be_listed_are_not_taken_for_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, walk: Callable[[LocalBlobStore], Iterator[object]]
) -> None:
    store = LocalBlobStore(tmp_path)
    assert list(walk(store)) == []  # nothing was put yet
    store.put(io.BytesIO(b"x"))

    def closed(path: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(HubUnavailable, match=r"^the hub's storage cannot be used: Permission denied$"):
        list(walk(store))
