"""What a client keeps of a shared hub: verified bytes, and what names meant when they were last asked.

<root>/blobs/      verified files and manifests, by SHA-256 (a `LocalBlobStore`)
<root>/partial/    downloads that were cut, going on where they end (see `hub.blobs.partials`)
<root>/known/      one small file for each name asked: the version it meant, when, and the newest event's number then
<root>/signatures/  those of a version, under its digest, as the server gave them last
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import platformdirs

from hub.blobs.local import LocalBlobStore
from hub.blobs.partials import Partial, Partials
from hub.errors import BlobNotFound, HubError, HubUnavailable
from hub.manifest import MAX_MANIFEST_BYTES, Manifest
from hub.refs import Digest
from hub.remote.address import Address
from hub.versions import Version

SIZE_ENVIRONMENT: Final = "LORAPLEX_HUB_CACHE_BYTES"
DEFAULT_BYTES: Final = 50 * 1024**3
MAX_KNOWN: Final = 10_000  # names
_PRUNE_EVERY: Final = 256
_KEEP_PARTIAL_SECONDS: Final = 24 * 3600.0
log = logging.getLogger(__name__)


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
        self._partials = Partials(self._partial)
        self._known = root / "known"
        self.signatures = root / "signatures"  # see `hub.remote.remote_signatures`
        self._max_bytes = max_bytes
        self._grown = True  # since `trim` looked last
        self._remembered = 0
        self._warned = False
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
        """Keep what `name` means now; where the cache cannot be written, say so once and go on without."""
        try:
            self._remember(name, version, seq)
        except (HubUnavailable, OSError) as error:
            if not self._warned:
                what = str(error) if isinstance(error, HubUnavailable) else error.strerror
                log.warning(
                    "the cache of the hub cannot be written, so it cannot go on when the server is away: %s", what
                )
            self._warned = True

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
                self.blobs.delete(digest)  # the next answer brings it back
                return None
            manifest = Manifest.parse(data)
        except HubError:
            return None
        return Version(known.full_name, known.number, digest, manifest, manifest.created), known

    def numbered(self, full_name: str, number: int) -> tuple[Version, Known] | None:
        """This version, by whatever name it was asked for, if it is known and whole."""
        for known in map(_read, self._known.glob("[0-9a-f]*")):
            if known is not None and (known.full_name, known.number) == (full_name, number):
                return self.recall(known.name)
        return None

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
    def partial(self, digest: Digest) -> Iterator[Partial]:
        """A file of one's own to append a download to, that goes on where an earlier one was cut.

        It is left for the next, unless it is whole and given to `keep`.
        """
        partial = self._partials.begin(digest)
        try:
            yield partial
        finally:
            partial.keep()

    def keep(self, partial: Partial, digest: Digest) -> None:
        """Keep a download that came to its end with this digest; other partial files of it are of no more use."""
        try:
            self.blobs.put_file(partial.path, digest)  # it has no other writer, so it need not be copied
        except HubUnavailable:  # who fetched the same removed its name
            partial.file.seek(0)
            self.blobs.put(partial.file)
        self._partials.remove(digest)
        self._grown = True

    def damaged(self, digest: Digest) -> None:
        """Drop bytes that turned out not to be what they are kept as."""
        self.blobs.delete(digest)

    def trim(self, keep: frozenset[Digest]) -> None:
        """Remove the oldest bytes above the limit, but never those in `keep`."""
        if not self._grown:
            return  # nothing came since the last look
        self._grown = False
        self._sweep_partial()
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

    def _remember(self, name: str, version: Version, seq: int) -> None:
        if not self.blobs.has(version.digest):
            self.blobs.put(io.BytesIO(version.manifest.canonical()))
        entry = Known(name, version.full_name, version.number, version.digest, time.time(), seq)
        path = self._path(name)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            temporary.write_text(json.dumps(asdict(entry)))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._remembered += 1
        if self._remembered % _PRUNE_EVERY == 0:
            self._prune()

    def _prune(self) -> None:
        """Forget the names that were asked for longest ago: a client may ask with a key for each of its users."""
        entries = []
        for path in self._known.glob("[0-9a-f]*"):
            with suppress(OSError):
                entries.append((path.stat().st_mtime, path))
        for _, path in sorted(entries)[: max(0, len(entries) - MAX_KNOWN)]:
            with suppress(OSError):
                path.unlink()

    def _sweep_partial(self) -> None:
        """Remove downloads that nobody went on with for a day: of killed processes, or not wanted any more."""
        before = time.time() - _KEEP_PARTIAL_SECONDS
        for path in self._partial.glob("*"):
            with suppress(OSError):
                if path.stat().st_mtime < before:
                    path.unlink()

    def _path(self, name: str) -> Path:
        return self._known / hashlib.sha256(name.encode()).hexdigest()


def _read(path: Path) -> Known | None:
    try:
        known = Known(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    texts = (known.name, known.full_name, known.digest)
    numbers = (known.number, known.time, known.seq)
    sound = all(isinstance(each, str) for each in texts) and all(isinstance(each, int | float) for each in numbers)
    return known if sound else None
