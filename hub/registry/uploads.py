"""Bytes on their way in: files of pushes that are not published yet, kept apart from the hub's own storage.

<root>/<uploader and adapter, hashed>/<64 hex digits>.part     cut short, goes on where it ends
<root>/<uploader and adapter, hashed>/<64 hex digits>          whole, and hashed to this digest

A caller reaches only what the same caller uploaded for the same adapter, so knowing a digest gives nobody the bytes,
and nobody's damaged upload stands in another's way. Names of these files are made here, never taken from the wire.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hub.errors import HubUnavailable, ServerBusy, UploadLost, UploadRefused
from hub.parsing import file_limit
from hub.refs import Digest

KEEP_SECONDS: Final = 24 * 3600.0
MAX_STAGED_BYTES: Final = 256 * 1024**3
_CHUNK: Final = 1024 * 1024


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
        with _translated():
            root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def whole(self, owner: str, digest: Digest) -> bool:
        """Whether all of this file is here."""
        return self._path(owner, digest).is_file()

    def received(self, owner: str, digest: Digest) -> int:
        """How many bytes are here of a file that is not whole."""
        try:
            return _partial(self._path(owner, digest)).stat().st_size
        except FileNotFoundError:
            return 0

    def receive(self, owner: str, name: str, digest: Digest, size: int, offset: int, chunks: Iterator[bytes]) -> int:
        """Append `chunks` from `offset` on; at the end hash the file and keep it, or refuse it and drop what is here.

        Returns the bytes that are here now: less than `size` where the chunks ended early. Raises UploadRefused, and
        UploadLost where `offset` is not where the bytes end.
        """
        check_file(name, size)
        whole = self._path(owner, digest)
        with self._alone(whole), _translated():
            if whole.is_file():
                return size
            self._check_room(size - offset)
            whole.parent.mkdir(exist_ok=True, mode=0o700)
            partial = _partial(whole)
            # Unbuffered: what came before a cut is there when the client asks where to go on.
            with partial.open("ab", buffering=0) as file:
                have = file.tell()
                if have != offset:
                    raise UploadLost(f"{name}: the server has {have} bytes, not {offset}; ask again where to go on")
                for chunk in chunks:
                    have += len(chunk)
                    if have > size:
                        partial.unlink()
                        raise UploadRefused(f"{name}: more bytes came than the {size} announced; all were dropped")
                    file.write(chunk)
                if have < size:
                    return have
            if _sha256(partial) != digest.hex:
                partial.unlink()
                raise UploadRefused(f"{name}: the bytes that came are not {digest}; all were dropped")
            partial.rename(whole)
            return size

    @contextmanager
    def directory(self) -> Iterator[Path]:
        """A new directory to lay a push out in, gone afterwards."""
        with _translated():
            directory = self._root / f"push-{uuid.uuid4().hex}"
            directory.mkdir(mode=0o700)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def place(self, owner: str, digest: Digest, target: Path) -> bool:
        """Put a whole upload at `target`; False where there is none."""
        with _translated():
            try:
                os.link(self._path(owner, digest), target)
            except FileNotFoundError:
                return False
        return True

    def drop(self, owner: str, digest: Digest) -> None:
        """Forget a file that was published."""
        with suppress(OSError):
            self._path(owner, digest).unlink()

    def sweep(self, keep_seconds: float = KEEP_SECONDS) -> None:
        """Remove what nobody went on with for so long."""
        before = time.time() - keep_seconds
        for path in self._root.glob("*/*"):
            with suppress(OSError):
                if path.stat().st_mtime < before:
                    path.unlink()
        for directory in self._root.glob("*"):
            with suppress(OSError):
                if directory.stat().st_mtime < before:
                    directory.rmdir()  # only where it is empty

    def _check_room(self, wanted: int) -> None:
        with self._lock:
            if time.monotonic() - self._swept > 3600 or not self._swept:
                self._swept = time.monotonic()
                self.sweep()
        held = 0
        for path in self._root.glob("*/*"):
            with suppress(OSError):
                held += path.stat().st_size
        if held + wanted > self._max:
            raise ServerBusy("the server holds as many bytes of unfinished pushes as it may; try again later")

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


def _sha256(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HubUnavailable(f"the server cannot keep uploads: {os.strerror(error.errno or 0)}") from error
