"""Downloads side by side, without locks: none spoils another, and what one left another goes on with."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from hub.blobs import BlobInfo
from hub.blobs.cached import CachedBlobStore
from hub.blobs.partials import Partials
from hub.blobs.s3 import S3BlobStore
from hub.errors import StorageUnreachable
from hub.refs import Digest
from hub.remote.cache import Cache

MIB = 1024 * 1024
DATA = random.Random(7).randbytes(4 * MIB)
DIGEST = Digest.of_hex(hashlib.sha256(DATA).hexdigest())
Take = Callable[[bytes], object]


class Far:
    """A far store of one blob; a test says what happens between its bytes."""

    def __init__(self) -> None:
        self.on_info: Callable[[], object] = lambda: None
        self.on_fetch: Callable[[int, int], object] = lambda call, start: None
        self.on_piece: Callable[[int, int], object] = lambda call, end: None  # the bytes up to `end` were taken
        self.calls = 0

    def info(self, digest: Digest) -> BlobInfo:
        self.on_info()
        return BlobInfo(len(DATA), 0.0)

    def fetch(self, digest: Digest, take: Take, start: int = 0) -> None:
        self.calls += 1
        call = self.calls
        self.on_fetch(call, start)
        while start < len(DATA):
            end = min(start - start % MIB + MIB, len(DATA))
            take(DATA[start:end])
            start = end
            self.on_piece(call, end)


def cached(far: Far, tmp_path: Path) -> CachedBlobStore:
    return CachedBlobStore(cast(S3BlobStore, far), tmp_path / "cache")


def read(store: CachedBlobStore) -> bytes:
    with store.open(DIGEST) as file:
        return file.read()


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: None)


def test_a_second_fetch_without_locks_does_not_cut_the_file_of_the_first(no_locks: None, tmp_path: Path) -> None:
    """Both wrote one partial file. The second hashed what the first was still writing, took it for damaged and cut it
    to nothing; the first, whose hash was right, moved the file into the cache and handed out what was left in it."""
    far, found = Far(), list[bytes]()
    begun, go_on, grown, finish = (threading.Event() for _ in range(4))
    first = threading.Thread(target=lambda: found.append(read(cached(far, tmp_path))))

    def on_piece(call: int, end: int) -> None:
        if call == 1 and end == MIB:
            begun.set()
            go_on.wait(20)
        if call == 1 and end == 2 * MIB:
            grown.set()
            finish.wait(20)

    def on_info() -> None:  # of the second: it has seen how long the file is
        go_on.set()
        grown.wait(20)

    def on_fetch(call: int, start: int) -> None:
        if call > 1 and start == 0:  # it has cut the file, and begins again
            go_on.set()
            finish.set()
            first.join(20)

    far.on_piece, far.on_info, far.on_fetch = on_piece, on_info, on_fetch
    first.start()
    assert begun.wait(20)
    second = read(cached(far, tmp_path))
    go_on.set()
    finish.set()
    first.join(20)
    assert second == DATA
    assert found == [DATA], "the first reader's bytes"
    assert read(cached(far, tmp_path)) == DATA
    assert [path.name for path in files_in(tmp_path / "cache")] == [DIGEST.hex]


def test_an_open_blob_is_not_cut_by_one_who_fetches_it_again(no_locks: None, tmp_path: Path) -> None:
    """A damaged beginning lay there: who found out later cut the file that was in the cache and being read."""
    (tmp_path / "cache" / "partial").mkdir(parents=True)
    (tmp_path / "cache" / "partial" / DIGEST.hex).write_bytes(bytes(MIB))
    far, quick, seen = Far(), list[io.BufferedIOBase](), list[bytes]()

    def on_fetch(call: int, start: int) -> None:
        if call == 1:  # another comes and is done before the first has found out
            quick.append(cast(io.BufferedIOBase, cached(far, tmp_path).open(DIGEST)))
        elif start == 0 and quick and not seen:
            seen.append(quick[0].read())

    far.on_fetch = on_fetch
    assert read(cached(far, tmp_path)) == DATA
    with quick[0]:
        assert (seen or [quick[0].read()]) == [DATA]


def test_a_damaged_copy_is_replaced_and_never_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who found a copy damaged removed what had its name by then, which could be a sound one."""
    far = Far()
    read(cached(far, tmp_path))
    [copy] = files_in(tmp_path / "cache")
    copy.write_bytes(b"damaged")
    removed: list[Path] = []
    unlink = Path.unlink

    def note(path: Path, missing_ok: bool = False) -> None:
        removed.append(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", note)
    assert read(cached(far, tmp_path)) == DATA
    assert copy not in removed
    assert copy.read_bytes() == DATA


def test_a_fetch_that_was_killed_is_gone_on_with_by_a_copy(tmp_path: Path) -> None:
    far, starts = Far(), list[int]()
    far.on_fetch = lambda call, start: starts.append(start)
    killed = Partials(tmp_path / "cache" / "partial").begin(DIGEST)
    killed.file.write(DATA[:MIB])
    assert read(cached(far, tmp_path)) == DATA
    assert starts == [MIB]
    assert os.fstat(killed.file.fileno()).st_size == MIB, "nobody else wrote there"
    assert [path.name for path in files_in(tmp_path / "cache")] == [DIGEST.hex]
    killed.file.write(DATA[MIB:])  # it lived after all, and its name is gone
    killed.publish(tmp_path / "elsewhere")
    killed.keep()
    assert [path.name for path in files_in(tmp_path)] == [DIGEST.hex]


def test_of_many_fetches_that_were_cut_the_longest_beginning_is_kept(tmp_path: Path) -> None:
    partials = Partials(tmp_path)
    many = [partials.begin(DIGEST) for _ in range(3)]
    for each, size in zip(many, (2, 3, 1), strict=True):
        each.file.write(DATA[:size])
    for each in many:
        each.keep()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(DIGEST.hex, DATA[:3])]
    again, beside = partials.begin(DIGEST), partials.begin(DIGEST)
    assert (again.file.read(), beside.file.tell()) == (DATA[:3], 3)
    assert not os.path.samestat(os.fstat(again.file.fileno()), os.fstat(beside.file.fileno()))
    again.file.close()
    beside.file.close()


def test_fetches_that_are_killed_again_and_again_do_not_pile_up(tmp_path: Path) -> None:
    partials = Partials(tmp_path)
    for turn in range(5):
        killed = partials.begin(DIGEST)
        assert killed.file.seek(0, os.SEEK_END) == turn
        killed.file.write(b"x")
        killed.file.close()
        os.utime(killed.path, (1e9 + turn, 1e9 + turn))
    assert len(files_in(tmp_path)) == 1


def test_a_beginning_that_does_not_fit_twice_is_gone_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: io.RawIOBase, target: io.RawIOBase, length: int) -> None:
        target.write(b"some")
        raise OSError(28, "No space left on device")

    partials = Partials(tmp_path)
    killed = partials.begin(DIGEST)
    killed.file.write(DATA[:MIB])
    monkeypatch.setattr("hub.blobs.partials.shutil.copyfileobj", full)
    with partials.begin(DIGEST).file as file:
        assert (file.seek(0, os.SEEK_END), file.tell()) == (0, 0)
    killed.file.close()


def test_what_was_cut_is_closed_before_another_can_go_on_with_it(tmp_path: Path) -> None:
    far = Far()

    def cut(call: int, end: int) -> None:
        if call == 1:
            raise StorageUnreachable("away")

    far.on_piece = cut
    with pytest.raises(StorageUnreachable):
        cached(far, tmp_path).open(DIGEST)
    assert [path.name for path in files_in(tmp_path)] == [DIGEST.hex]
    far.on_fetch = lambda call, start: None if start == MIB else pytest.fail(f"fetched again from {start}")
    assert read(cached(far, tmp_path)) == DATA


def test_downloads_from_a_shared_hub_share_no_file_either(no_locks: None, tmp_path: Path) -> None:
    """Who found a beginning damaged cut the file that another was writing, and read a hole."""
    cache = Cache(tmp_path)
    with cache.partial(DIGEST) as first:
        first.file.write(DATA[:10])
        with cache.partial(DIGEST) as second:
            assert second.file.seek(0, os.SEEK_END) == 10
            second.file.truncate(0)
        first.file.seek(0)
        assert first.file.read() == DATA[:10]
    with cache.partial(DIGEST) as third:
        assert third.file.seek(0, os.SEEK_END) == 10
        third.file.write(DATA[10:])
        cache.keep(third, DIGEST)
    assert [path.name for path in files_in(tmp_path)] == [DIGEST.hex]
    with cache.blobs.open(DIGEST) as file:
        assert file.read() == DATA


def test_a_download_whose_name_another_removed_is_kept_all_the_same(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.partial(DIGEST) as first, cache.partial(DIGEST) as second:
        for each in (first, second):
            each.file.write(DATA)
        cache.keep(second, DIGEST)
        cache.damaged(DIGEST)
        cache.keep(first, DIGEST)
    assert [path.name for path in files_in(tmp_path)] == [DIGEST.hex]
    with cache.blobs.open(DIGEST) as file:
        assert file.read() == DATA
