"""Bytes on their way in: files of pushes that are not published yet, kept apart from the hub's own storage.

<root>/<uploader and adapter, hashed>/<64 hex digits>.part     cut short, goes on where it ends
<root>/<uploader and adapter, hashed>/<64 hex digits>          whole, and hashed to this digest

A caller reaches only what the same caller uploaded for the same adapter, so knowing a digest gives nobody the bytes,
and nobody's damaged upload stands in another's way. Names of these files are made here, never taken from the wire.
Nothing here is sure to be on the disk: what a power cut damages is found when it is published, and uploaded again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hub.errors import HubUnavailable, ServerBusy, UploadLost, UploadRefused
from hub.full_write import write_all
from hub.parsing import file_limit
from hub.refs import Digest
from hub.registry.writers import nobody_writes
from hub.write_back import WriteBack

KEEP_SECONDS: Final = 24 * 3600.0
MAX_STAGED_BYTES: Final = 256 * 1024**3
_CHUNK: Final = 1024 * 1024
_BLOCK: Final = 4096
_PUSH: Final = "push-"


class Uploads:
    """The unfinished pushes of one server; safe to use from several threads.

    Raises HubUnavailable where the directory cannot be used.
    """

    def __init__(self, root: Path, *, max_staged_bytes: int = MAX_STAGED_BYTES) -> None:
        self._root = root
        self._max = max_staged_bytes
        self._lock = threading.Lock()
        self._busy: dict[Path, _Turn] = {}
        self._swept = 0.0
        self._reserved = 0  # bytes that uploads under way may still write
        self._anew: set[Path] = set()  # files whose copies in the hub turned out damaged
        with _translated():
            root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def whole(self, owner: str, digest: Digest) -> bool:
        """Whether all of this file is here."""
        return self._path(owner, digest).is_file()

    def received(self, owner: str, digest: Digest, size: int) -> int:
        """How many bytes are here of a file of `size` bytes that is not whole."""
        try:
            have = _partial(self._path(owner, digest)).stat().st_size
        except FileNotFoundError:
            return 0
        return have if have <= size else 0

    def receive(self, owner: str, name: str, digest: Digest, size: int, offset: int, chunks: Iterator[bytes]) -> int:
        """Append `chunks` from `offset` on; at the end keep the file, or, where its hash is wrong, drop what is here.

        Returns the bytes that are here now: less than `size` where the chunks ended early. Raises UploadRefused, and
        UploadLost where `offset` is not where the bytes end.
        """
        check_file(name, size)
        whole = self._path(owner, digest)
        with self._alone(whole), _translated():
            if whole.is_file():
                return size
            with self._room(size - min(offset, size)) as wrote:
                whole.parent.mkdir(exist_ok=True, mode=0o700)
                partial = _partial(whole)
                # Unbuffered: what came before a cut is there when the client asks where to go on.
                with partial.open("ab", buffering=0) as file:
                    have = file.tell()
                    if have > size:  # of an upload that announced more bytes under this digest
                        file.truncate(have := 0)
                    if have != offset:
                        raise UploadLost(f"{name}: the server has {have} bytes, not {offset}; ask again where to go on")
                    disk = WriteBack(file.fileno(), have)
                    hasher = _hasher(partial)  # of what is here; the rest is hashed as it comes
                    for chunk in chunks:
                        have += len(chunk)
                        if have > size:
                            partial.unlink()
                            raise UploadRefused(f"{name}: more bytes came than the {size} announced; all were dropped")
                        write_all(file, chunk)
                        disk.wrote(have)
                        wrote(len(chunk))
                        hasher.update(chunk)
                    if have < size:
                        return have
            if hasher.hexdigest() != digest.hex:
                partial.unlink()
                raise UploadRefused(f"{name}: the bytes that came are not {digest}; all were dropped")
            partial.rename(whole)
            return size

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A new directory to lay a push out in, gone afterwards."""
        with _translated():
            directory = self._root / f"{_PUSH}{uuid.uuid4().hex}"
            directory.mkdir(mode=0o700)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @contextmanager
    def new_file(self, target: Path, size: int) -> Iterator[Callable[[bytes], object]]:
        """Make `target`, of at most `size` bytes, in a `directory()`; what is given is called with them."""
        with _translated(), self._room(size), target.open("xb") as file:
            yield file.write

    def place(self, owner: str, digest: Digest, target: Path) -> bool:
        """Put a whole upload at `target`, where nobody can change it any more; False where there is none."""
        whole = self._path(owner, digest)
        with _translated():
            try:
                if nobody_writes(whole):
                    os.link(whole, target)
                    return True
                # A server that shares this directory may still be at it: of an upload that went on here.
                with whole.open("rb") as source, self.new_file(target, whole.stat().st_size) as write:
                    while chunk := source.read(_CHUNK):
                        write(chunk)
            except FileNotFoundError:
                return False
        return True

    def drop(self, owner: str, digest: Digest) -> None:
        """Forget a file that was published."""
        self._anew.discard(self._path(owner, digest))
        with suppress(OSError):
            self._path(owner, digest).unlink()

    def ask_anew(self, owner: str, digest: Digest) -> None:
        """The hub's own copy of this file is damaged: this caller's next push has to bring the bytes again."""
        self._anew.add(self._path(owner, digest))

    def asked_anew(self, owner: str, digest: Digest) -> bool:
        """Whether `ask_anew` was said, and the bytes did not come and go into a version since."""
        return self._path(owner, digest) in self._anew

    def sweep(self, keep_seconds: float = KEEP_SECONDS) -> None:
        """Remove what nobody went on with for so long."""
        before = time.time() - keep_seconds
        for directory in self._root.glob("*"):
            with suppress(OSError):
                if directory.name.startswith(_PUSH):  # its files may be as old as their upload
                    if directory.stat().st_mtime < before:
                        shutil.rmtree(directory)
                    continue
                for path in directory.iterdir():
                    if path.stat().st_mtime < before:
                        path.unlink()
                if directory.stat().st_mtime < before:
                    directory.rmdir()  # only where it is empty

    @contextmanager
    def _room(self, wanted: int) -> Iterator[Callable[[int], None]]:
        """Keep `wanted` bytes free for this caller; what is given is told of those that were written.

        Raises ServerBusy where others have taken them.
        """
        wanted = left = max(wanted, _BLOCK)
        with self._lock:
            if time.monotonic() - self._swept > 3600 or not self._swept:
                self._swept = time.monotonic()
                self.sweep()
            if self._held() + self._reserved + wanted > self._max:
                raise ServerBusy("the server holds as many bytes of unfinished pushes as it may; try again later")
            self._reserved += wanted

        def wrote(count: int) -> None:
            nonlocal left
            with self._lock:
                count = min(count, left)
                left -= count
                self._reserved -= count

        try:
            yield wrote
        finally:
            with self._lock:
                self._reserved -= left

    def _held(self) -> int:
        """The bytes that are here; a file counts as one block at least, so that empty ones are bounded too."""
        held = 0
        for path in self._root.glob("*/*"):
            with suppress(OSError):
                found = path.stat()
                if found.st_nlink == 1 or not path.parent.name.startswith(_PUSH):  # else it is counted where it came
                    held += max(found.st_size, _BLOCK)
        return held

    def _path(self, owner: str, digest: Digest) -> Path:
        return self._root / hashlib.sha256(owner.encode()).hexdigest()[:32] / Digest.parse(digest).hex

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Two uploads of one file take turns; the second finds it whole."""
        with self._lock:
            turn = self._busy.setdefault(path, _Turn())
            turn.users += 1
        try:
            if not turn.lock.acquire(timeout=60):
                raise ServerBusy("another upload of this file is running; try again later")
            try:
                yield
            finally:
                turn.lock.release()
        finally:
            with self._lock:
                turn.users -= 1
                if not turn.users:
                    del self._busy[path]


@dataclass
class _Turn:
    """Whose turn it is with one file, and how many wait for theirs or have it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0


def check_file(name: str, size: int) -> None:
    """Raise UploadRefused where an adapter has no file of this name, or none so large."""
    limit = file_limit(name)
    if limit is None:
        raise UploadRefused(f"{name[:80]!a} is no file of an adapter or a model")
    if size > limit:
        raise UploadRefused(f"{name} has {size} bytes; at most {limit} are taken")


def _partial(whole: Path) -> Path:
    return whole.with_name(whole.name + ".part")


def _hasher(path: Path) -> hashlib._Hash:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HubUnavailable(f"the server cannot keep uploads: {os.strerror(error.errno or 0)}") from error
