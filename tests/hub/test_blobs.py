"""The contract of `hub.blobs.BlobStore`; every storage engine is to pass it."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub.blobs import BlobStore
from hub.blobs.local import LocalBlobStore
from hub.errors import BlobNotFound, HubUnavailable, RefInvalid
from hub.refs import Digest


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    yield LocalBlobStore(tmp_path / "blobs")


def read(store: BlobStore, digest: Digest) -> bytes:
    with store.open(digest) as file:
        return file.read()


@pytest.mark.parametrize("data", [b"", b"x", b"many" * 1_000_000])
def test_what_is_put_can_be_read_under_its_sha256(store: BlobStore, data: bytes) -> None:
    digest, size = store.put(io.BytesIO(data))
    assert digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert (size, read(store, digest), store.has(digest), list(store.digests())) == (len(data), data, True, [digest])


def test_an_absent_blob_is_not_found(store: BlobStore) -> None:
    absent = Digest.of_hex("0" * 64)
    assert not store.has(absent)
    with pytest.raises(BlobNotFound):
        store.open(absent)


def test_no_name_but_a_digest_reaches_the_storage(store: BlobStore) -> None:
    for text in ("sha256:../../etc/passwd", "sha256:" + "0" * 63 + "/", "md5:0"):
        with pytest.raises(RefInvalid):
            store.open(Digest(text))


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
