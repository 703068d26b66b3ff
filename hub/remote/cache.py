"""What a client keeps of a shared hub: verified bytes, and what names meant when they were last asked.

<root>/blobs/      verified files and manifests, by SHA-256 (a `LocalBlobStore`)
<root>/partial/    downloads that were cut, going on where they end
<root>/known/      one small file for each name asked: the version it meant, when, and the newest event's number then
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Final

import platformdirs

from hub.blobs.local import LocalBlobStore
from hub.errors import BlobNotFound, HubError, HubUnavailable
from hub.manifest import MAX_MANIFEST_BYTES, Manifest
from hub.refs import Digest
from hub.remote.address import Address
from hub.versions import Version

SIZE_ENVIRONMENT: Final = "LORAPLEX_HUB_CACHE_BYTES"
DEFAULT_BYTES: Final = 50 * 1024**3


@dataclass(frozen=True)
class Known:
    """What a name meant once."""

    name: str  # the reference as asked, with the key if any
    full_name: str
    number: int
    digest: str
    time: float  # Unix time
    seq: int  # the newest event's number, read before the answer

    @property
    def age_seconds(self) -> float:
        """How long ago that was."""
        return max(0.0, time.time() - self.time)


class Cache:
    """One server's cache in one directory; for several threads and processes at once."""

    def __init__(self, root: Path, max_bytes: int = DEFAULT_BYTES) -> None:
        self.blobs = LocalBlobStore(root / "blobs")
        self._partial = root / "partial"
        self._known = root / "known"
        self._max_bytes = max_bytes
        try:
            for directory in (self._partial, self._known):
                directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise HubUnavailable(f"the cache of the hub cannot be made: {error.strerror}") from error

    @classmethod
    def of(cls, address: Address) -> Cache:
        """This user's cache of one server; raises HubUnavailable."""
        try:
            size = int(os.environ.get(SIZE_ENVIRONMENT) or DEFAULT_BYTES)
        except ValueError as error:
            raise HubUnavailable(f"{SIZE_ENVIRONMENT} is no number of bytes") from error
        name = hashlib.sha256(str(address).encode()).hexdigest()[:16]
        return cls(platformdirs.user_cache_path("loraplex") / "remote" / name, size)

    def remember(self, name: str, version: Version, seq: int) -> None:
        """Keep what `name` means now."""
        if not self.blobs.has(version.digest):
            self.blobs.put(io.BytesIO(version.manifest.canonical()))
        entry = Known(name, version.full_name, version.number, version.digest, time.time(), seq)
        path = self._path(name)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_text(json.dumps(asdict(entry)))
            temporary.replace(path)
        except OSError as error:
            raise HubUnavailable(f"the cache of the hub cannot be written: {error.strerror}") from error

    def recall(self, name: str) -> tuple[Version, Known] | None:
        """What `name` meant when it was last asked, if that is known and whole."""
        known = _read(self._path(name))
        if known is None or known.name != name:
            return None
        try:
            digest = Digest.parse(known.digest)
            with self.blobs.open(digest) as file:
                data = file.read(MAX_MANIFEST_BYTES + 1)
            if hashlib.sha256(data).hexdigest() != digest.hex:
                return None
            manifest = Manifest.parse(data)
        except HubError:
            return None
        return Version(known.full_name, known.number, digest, manifest, manifest.created), known

    def forget(self, name: str) -> None:
        """The server says that `name` means nothing any more."""
        with suppress(OSError):
            self._path(name).unlink()

    def oldest_seq(self) -> int | None:
        """An event number before which nothing can have changed what is known; None where nothing is."""
        return min(
            (known.seq for known in map(_read, self._known.glob("[0-9a-f]*")) if known is not None), default=None
        )

    @contextmanager
    def partial(self, digest: Digest) -> Iterator[FileIO]:
        """A file to append a download to, that goes on where an earlier one was cut; one process at a time.

        Others meanwhile get a file of their own. Whoever finishes removes it. Where locks do nothing several write one
        file, each at its own place in it: what they write there is the same.
        """
        path = self._partial / digest.hex
        file = _begun(path)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another may have finished and removed it between the opening and the lock.
                mine = path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino
            except OSError:
                mine = False
            if not mine:
                file.close()
                path = self._partial / f"{digest.hex}.{uuid.uuid4().hex}"
                file = _begun(path)
            try:
                yield file
            finally:
                if not mine:
                    path.unlink(missing_ok=True)
        finally:
            file.close()

    def finished(self, digest: Digest) -> None:
        """A download came to its end: its partial file is of no more use."""
        (self._partial / digest.hex).unlink(missing_ok=True)

    def damaged(self, digest: Digest) -> None:
        """Drop bytes that turned out not to be what they are kept as."""
        self.blobs.delete(digest)

    def trim(self, keep: frozenset[Digest]) -> None:
        """Remove the oldest bytes above the limit, but never those in `keep`."""
        held = []
        for digest in self.blobs.digests():
            with suppress(BlobNotFound):
                info = self.blobs.info(digest)
                held.append((info.modified, info.bytes, digest))
        total = sum(size for _, size, _ in held)
        for _, size, digest in sorted(held):
            if total <= self._max_bytes:
                return
            if digest not in keep:
                self.blobs.delete(digest)
                total -= size

    def _path(self, name: str) -> Path:
        return self._known / hashlib.sha256(name.encode()).hexdigest()


def _begun(path: Path) -> FileIO:
    """A file to write at one's own place in it, not (as in append mode) at its end; begun or new."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)


def _read(path: Path) -> Known | None:
    try:
        return Known(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
