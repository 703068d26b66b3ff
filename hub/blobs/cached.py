"""A verified copy, on this machine, of blobs that are kept far away.

    <root>/sha256/<first two digits>/<64 hex digits>     whole and checked when they were fetched
    <root>/partial/                                      fetches under way, or cut short (see `hub.blobs.partials`)

Nothing is taken on trust: a blob enters only when its bytes have its digest, and is hashed again each time it is
opened; a copy that was damaged here is fetched anew. Blobs that are here can be read while the far store is away.
Nothing is locked either: a file here is written by one process, before it has its name, and replaced as a whole.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, cast

from hub.blobs import BlobInfo, BlobStore, Unfinished
from hub.blobs.partials import Partials
from hub.blobs.s3 import S3BlobStore
from hub.errors import BlobCorrupt, HubUnavailable
from hub.full_write import write_all
from hub.refs import Digest

CACHE_BYTES: Final = 20 * 1024**3
ENVIRONMENT: Final = "LORAPLEX_CACHE_BYTES"  # another limit


def limit() -> int:
    """The cache's size in bytes; raises HubUnavailable where the environment has no number there."""
    text = os.environ.get(ENVIRONMENT, str(CACHE_BYTES))
    if not (text.isascii() and text.isdigit()):
        raise HubUnavailable(f"{ENVIRONMENT} is a number of bytes, not {text[:40]!a}")
    return int(text)


class CachedBlobStore(BlobStore):
    """The far store, read through a directory of this machine; what is not reading goes straight through."""

    def __init__(self, far: S3BlobStore, root: Path, *, max_bytes: int = CACHE_BYTES) -> None:
        self._far = far
        self._blobs = root / "sha256"
        self._partial = root / "partial"
        self._partials = Partials(self._partial)
        self._max_bytes = max_bytes

    def put(self, source: BinaryIO) -> tuple[Digest, int]:
        """Store what is left of `source`; its digest and length in bytes."""
        return self._far.put(source)

    def open(self, digest: Digest) -> BinaryIO:
        """The blob as a binary file for the caller to close; raises BlobNotFound.

        Its bytes have been checked; raises BlobCorrupt where those in the far store are not what they should be.
        """
        path = self._path(digest)
        found = _open_sound(path, digest)
        if found is not None:
            return found
        try:
            return self._fetch(digest, path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
                raise HubUnavailable("the cache of the hub's files cannot be used") from error
            return self._fetch_uncached(digest)  # slower each time, and not wrong

    def has(self, digest: Digest) -> bool:
        """Whether the far store has the blob; says nothing of its health."""
        return self._far.has(digest)

    def digests(self) -> Iterator[Digest]:
        """All blobs of the far store, in no particular order."""
        return self._far.digests()

    def infos(self) -> Iterator[tuple[Digest, BlobInfo]]:
        """All blobs of the far store with what it knows of them."""
        return self._far.infos()

    def info(self, digest: Digest) -> BlobInfo:
        """Size and time of a blob of the far store; raises BlobNotFound."""
        return self._far.info(digest)

    def delete(self, digest: Digest) -> None:
        """Give the blob's bytes back, here and there."""
        self._far.delete(digest)
        with suppress(OSError):
            self._path(digest).unlink(missing_ok=True)

    def unfinished(self) -> Iterator[Unfinished]:
        """What puts to the far store that died left behind, and what running ones are writing."""
        return self._far.unfinished()

    def discard(self, unfinished: Unfinished) -> None:
        """Remove one of `unfinished`; a put that still writes it fails and leaves nothing."""
        self._far.discard(unfinished)

    def stored(self) -> BlobStore:
        """The far store: what is checked is what lasts, not a copy of it."""
        return self._far

    def _path(self, digest: Digest) -> Path:
        hex_digits = Digest.parse(digest).hex
        return self._blobs / hex_digits[:2] / hex_digits

    def _fetch(self, digest: Digest, path: Path) -> BinaryIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._partials.begin(digest)
        try:
            self._fill(digest, partial.file)
            partial.publish(path)
            self._partials.remove(digest)
            _touch(path)
            self._make_room(path)
        except BlobCorrupt:
            partial.file.close()
            self._partials.remove(digest)  # what others left of it is no better
            raise
        except FileNotFoundError:
            pass  # somebody removed the cache; the file is open
        except BaseException:
            partial.keep()
            raise
        partial.file.seek(0)
        return io.BufferedReader(partial.file)

    def _fill(self, digest: Digest, file: BinaryIO) -> None:
        """Fetch what the file lacks; raises BlobCorrupt where the whole does not come to `digest`."""
        begun = file.seek(0, io.SEEK_END)
        if begun:
            if begun <= self._far.info(digest).bytes and self._complete(digest, file, begun):
                return
            file.seek(0)
            file.truncate()
        if not self._complete(digest, file, 0):
            raise BlobCorrupt(f"{digest} is damaged in the hub's storage")

    def _complete(self, digest: Digest, file: BinaryIO, begun: int) -> bool:
        hasher = hashlib.sha256()
        file.seek(0)
        while chunk := file.read(1024 * 1024):
            hasher.update(chunk)

        def take(chunk: bytes) -> None:
            hasher.update(chunk)
            write_all(file, chunk)

        if not begun or begun < self._far.info(digest).bytes:
            self._far.fetch(digest, take, begun)
        file.flush()
        return hasher.hexdigest() == digest.hex

    def _fetch_uncached(self, digest: Digest) -> BinaryIO:
        file = cast(BinaryIO, tempfile.SpooledTemporaryFile(max_size=64 * 1024 * 1024))  # noqa: SIM115
        try:
            self._fill(digest, file)
        except OSError as error:
            file.close()
            raise HubUnavailable(
                "neither the cache nor the directory for temporary files takes the hub's files"
            ) from error
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file

    def _make_room(self, newest: Path) -> None:
        """Remove what was not opened for the longest, down to the limit; files that are open read on."""
        entries = []
        for path in (*self._blobs.glob("??/*"), *self._partial.iterdir()):
            with suppress(FileNotFoundError):
                found = path.stat()
                entries.append((found.st_mtime, found.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._max_bytes:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _touch(path: Path) -> None:
    """Note that the copy was opened just now, for `_make_room`; finer than the kernel's own clock for files."""
    now = time.time_ns()
    with suppress(OSError):
        os.utime(path, ns=(now, now))


def _open_sound(path: Path, digest: Digest) -> BinaryIO | None:
    """The cached copy, just hashed; None where there is none, or none that is sound."""
    try:
        file = path.open("rb")
    except OSError:
        return None
    try:
        if hashlib.file_digest(file, "sha256").hexdigest() == digest.hex:
            _touch(path)
            file.seek(0)
            return file
    except OSError:
        pass  # unreadable is as good as damaged
    file.close()  # and left to be replaced: another may have done it by now
    return None
