"""Blobs as files: `<root>/sha256/<first two digits>/<64 hex digits>`, written next door in `<root>/staging`.

Order of a put: unique temporary file → hash while writing → fsync → link to its name (never replacing) → fsync of the
directory. A crash leaves at most a temporary file, which nobody reads. `put_file` begins at the fsync.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from hub.blobs import BlobInfo, BlobStore, Unfinished
from hub.errors import BlobNotFound, BlobsSwept, HubUnavailable
from hub.refs import Digest

_CHUNK: Final = 1024 * 1024
_YOUNG_SECONDS: Final = 60.0
_HEX = re.compile(r"[0-9a-f]{64}")

Step = Callable[[str], None]  # called with the name of each step just before it; tests cut the run there


def no_step(name: str) -> None:
    """Do nothing at a step."""


class LocalBlobStore(BlobStore):
    """Blobs under one directory of this machine, on one file system."""

    def __init__(self, root: Path, *, step: Step = no_step) -> None:
        self._blobs = root / "sha256"
        self._staging = root / "staging"
        self._root = root
        self._step = step
        self._durable: set[Path] = set()  # directories whose own names survive a power cut, as far as is known here

    def put(self, source: BinaryIO) -> tuple[Digest, int]:
        """Store what is left of `source`; its digest and length in bytes."""
        temporary = self._staging / uuid.uuid4().hex
        try:
            self._make_directories()
            self._step("blob:create")
            digest, size = self._write(temporary, source)
            self._publish(temporary, self._path(digest), size)
        except FileNotFoundError as error:
            raise BlobsSwept("a sweep took what was being stored: push again") from error
        except OSError as error:
            raise storage_unavailable(error) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        return digest, size

    def put_file(self, path: Path, digest: Digest) -> Digest:
        """Store the file `path`, see `BlobStore`; where a link can reach it nothing is copied and nothing read."""
        try:
            self._make_directories()
            if not self._reaches(path):
                return super().put_file(path, digest)
            self._step("blob:sync")
            size = _settle(path)
            self._publish(path, self._path(digest), size)
        except OSError as error:
            if error.errno == errno.EXDEV:  # one file system, mounted twice
                return super().put_file(path, digest)
            raise storage_unavailable(error) from error
        return digest

    def flush_file(self, path: Path) -> bool:
        """Make a file durable that `put_file` is to keep; False where it would copy it."""
        try:
            if reached := self._reaches(path):
                _settle(path)
        except OSError as error:
            raise storage_unavailable(error) from error
        return reached

    def open(self, digest: Digest) -> BinaryIO:
        """The blob as a binary file for the caller to close; raises BlobNotFound."""
        try:
            return self._path(digest).open("rb")
        except FileNotFoundError as error:
            raise BlobNotFound(f"the store has no {digest}") from error
        except OSError as error:
            raise storage_unavailable(error) from error

    def has(self, digest: Digest) -> bool:
        """Whether the blob is there; says nothing of its health."""
        try:
            return self._path(digest).is_file()
        except OSError as error:
            raise storage_unavailable(error) from error

    def digests(self) -> Iterator[Digest]:
        """All blobs, in no particular order."""
        for folder in _names(self._blobs):
            if len(folder) == 2:
                yield from (Digest.of_hex(name) for name in _names(self._blobs / folder) if _HEX.fullmatch(name))

    def info(self, digest: Digest) -> BlobInfo:
        """Size and time of a blob; raises BlobNotFound."""
        try:
            found = self._path(digest).stat()
        except FileNotFoundError as error:
            raise BlobNotFound(f"the store has no {digest}") from error
        except OSError as error:
            raise storage_unavailable(error) from error
        return BlobInfo(found.st_size, found.st_mtime)

    def delete(self, digest: Digest) -> None:
        """Give the blob's bytes back; nothing happens where it is not there."""
        self._step("blob:delete")
        try:
            self._path(digest).unlink(missing_ok=True)
        except OSError as error:
            raise storage_unavailable(error) from error

    def unfinished(self) -> Iterator[Unfinished]:
        """What puts that died left behind, and what running ones are writing."""
        for name in _names(self._staging):
            try:
                found = (self._staging / name).stat()
            except FileNotFoundError:
                continue  # a put came to its end
            except OSError as error:
                raise storage_unavailable(error) from error
            yield Unfinished(name, found.st_size, found.st_mtime)

    def discard(self, unfinished: Unfinished) -> None:
        """Remove one of `unfinished`; a put that still writes it fails and leaves nothing."""
        try:
            (self._staging / Path(unfinished.name).name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_unavailable(error) from error

    def _reaches(self, path: Path) -> bool:
        """Whether a file is on the blobs' file system."""
        there = next(each for each in (self._blobs, *self._blobs.parents) if each.exists())
        return path.stat().st_dev == there.stat().st_dev

    def _make_directories(self) -> None:
        if not (self._blobs.is_dir() and self._staging.is_dir()):
            for directory in (self._blobs, self._staging):
                directory.mkdir(parents=True, exist_ok=True)
            sync_directory(self._root)
            sync_directory(self._root.parent)

    def _path(self, digest: Digest) -> Path:
        hex_digits = Digest.parse(digest).hex  # parsed again: a path is made of it
        return self._blobs / hex_digits[:2] / hex_digits

    def _write(self, temporary: Path, source: BinaryIO) -> tuple[Digest, int]:
        hasher, size = hashlib.sha256(), 0
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
        with os.fdopen(descriptor, "wb") as file:
            self._step("blob:write")
            while chunk := source.read(_CHUNK):
                hasher.update(chunk)
                size += file.write(chunk)
            file.flush()
            self._step("blob:sync")
            os.fsync(file.fileno())
        return Digest.of_hex(hasher.hexdigest()), size

    def _publish(self, temporary: Path, final: Path, size: int) -> None:
        final.parent.mkdir(exist_ok=True)
        self._step("blob:link")
        try:
            os.link(temporary, final)
        except FileExistsError:
            if not _holds(final, size):
                # The stored copy is damaged; these bytes have the right digest. Replacing is atomic.
                temporary.replace(final)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            # A file system without hard links. Whoever was first, the bytes are the same.
            temporary.replace(final)
        self._step("blob:sync-directory")
        sync_directory(final.parent)
        if final.parent not in self._durable:  # nobody removes one
            sync_directory(self._blobs)
            self._durable.add(final.parent)


def _names(directory: Path) -> list[str]:
    """What is in a directory; where it may not be read that is said, as nobody may take its blobs for missing."""
    try:
        return [path.name for path in directory.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise storage_unavailable(error) from error


def _settle(path: Path) -> int:
    """Make a file read-only, as young as one just written (a sweep spares the young) and durable; its size."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        readers = found.st_mode & 0o444  # no more than its creator let read it
        if found.st_mode & 0o777 != readers:
            os.fchmod(descriptor, readers)
        if abs(time.time() - found.st_mtime) > _YOUNG_SECONDS:
            os.utime(descriptor)
        os.fsync(descriptor)
        return found.st_size
    finally:
        os.close(descriptor)


def _holds(path: Path, size: int) -> bool:
    """Whether the file still has the digest in its name; `size` spares reading one that cannot."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            return False
        return hashlib.file_digest(file, "sha256").hexdigest() == path.name


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_unavailable(error: OSError) -> HubUnavailable:
    """The error to raise where the storage failed, without its paths."""
    what = os.strerror(error.errno) if error.errno else type(error).__name__
    advice = " - free some space and try again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return HubUnavailable(f"the hub's storage cannot be used: {what}{advice}")
