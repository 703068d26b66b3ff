"""A hub without its server and its bucket: what this machine has verified copies of, and no packet sent."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, NoReturn, Self, cast

from hub import pull
from hub.blobs import BlobInfo, BlobStore, Unfinished
from hub.errors import BlobCorrupt, NotCached
from hub.opening import named
from hub.place import Place
from hub.progress import Progress
from hub.refs import AdapterRef, Alias, Digest
from hub.refs import Version as Number
from hub.versions import Version

if TYPE_CHECKING:
    from hub.blobs.s3 import S3BlobStore
    from hub.facade import HubFacade
    from hub.remote.cache import Cache, Known

log = logging.getLogger(__name__)


def open_offline(url: str | None = None) -> HubFacade:
    """The hub at `url` as far as it is on this machine: `resolve`, `get`, `read_file`, `pull` and `signatures`.

    A hub in a directory is all there; of a shared hub, or of one whose files are in S3, it is what the cache holds.
    Raises NotCached where nothing can be, HubNotFound, HubUnavailable.
    """
    text = named(url)
    if text.startswith(("grpc://", "grpcs://")):
        from hub.remote.address import Address
        from hub.remote.cache import Cache

        return cast("HubFacade", OfflineHub(Cache.of(Address.parse(text)), text.partition("?")[0]))
    place = Place.parse(url)
    if place.directory is None or place.database is not None:
        raise NotCached("the catalog is in PostgreSQL, so nothing can be looked up without it")
    from hub import location
    from hub.hub import Hub

    blobs, entries = location.open_existing(url)
    if place.bucket is None:
        return Hub(blobs, entries)
    import platformdirs

    from hub.blobs.cached import CachedBlobStore

    far = cast("S3BlobStore", Nowhere())
    return Hub(CachedBlobStore(far, platformdirs.user_cache_path("loraplex") / "blobs"), entries)


class OfflineHub:
    """What a client's cache knows of a shared hub."""

    def __init__(self, cache: Cache, place: str) -> None:
        self._cache = cache
        self._place = place

    def close(self) -> None:
        """There is nothing to give back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def resolve(self, ref: AdapterRef | str, key: str | None = None) -> Version:
        """What `ref` meant when the server was last asked, its age in the log; raises NotCached."""
        parsed = AdapterRef.parse(ref) if isinstance(ref, str) else ref
        selector = parsed.selector
        found = self._cache.recall(str(parsed) if key is None else f"{parsed} for {key}")
        if found is None and isinstance(selector, Digest):
            found = self._cache.recall(selector)
        if found is None and isinstance(selector, Number):
            found = self._cache.numbered(parsed.full_name, selector.number)
        if found is None or found[0].full_name != parsed.full_name:
            raise NotCached(f"what {parsed} is at {self._place} is not known here: ask once while it answers")
        version, known = found
        if isinstance(selector, Alias):
            log.warning("%s is %s, as of %s ago", parsed, version.text, age_text(known))
        return version

    def get(self, digest: Digest | str) -> Version:
        """The version with this digest; raises NotCached."""
        found = self._cache.recall(Digest.parse(digest))
        if found is None:
            raise NotCached(f"the version {digest} of {self._place} is not in the cache")
        return found[0]

    def signatures(self, digest: Digest | str) -> tuple[bytes, ...]:
        """Its signatures as the server gave them last; raises NotCached where it was not asked."""
        from hub.remote.remote_signatures import recall

        found = recall(self._cache, Digest.parse(digest))
        if found is None:
            raise NotCached(f"the signatures of {digest} are not in the cache: ask for them once while the hub answers")
        return found

    def read_file(self, version: Version | Digest | str, filename: str) -> bytes:
        """The bytes of one file, checked; raises NotCached, FileNotInVersion."""
        from hub.arguments import check_has
        from hub.verify import read_checked

        found = version if isinstance(version, Version) else self.get(version)
        check_has(found, filename)
        self._require(found, (filename,))
        try:
            return read_checked(self._cache.blobs, found, filename)
        except BlobCorrupt as error:
            raise self._damaged(found) from error

    def pull(self, ref: AdapterRef | str, directory: Path | str, progress: Progress | None = None) -> Version:
        """See `Hub.pull`; from the cache alone. Raises NotCached, naming the files that are not there or not sound."""
        version = self.resolve(ref)
        pull.check_target(Path(directory))
        self._require(version, tuple(version.manifest.files))
        try:
            pull.write_directory(self._cache.blobs, version, Path(directory), progress)
        except BlobCorrupt as error:
            raise self._damaged(version) from error
        return version

    def _require(self, version: Version, names: tuple[str, ...]) -> None:
        files = version.manifest.files
        missing = [name for name in names if not self._cache.blobs.has(files[name].sha256)]
        if missing:
            raise NotCached(
                f"{version.text} is not whole in the cache, {', '.join(missing)} missing: pull it once while "
                f"{self._place} answers"
            )

    def _damaged(self, version: Version) -> NotCached:
        """Drop the copies that are not sound any more, and say which they were."""
        from hub.verify import read_checked

        dropped = []
        for name, entry in version.manifest.files.items():
            try:
                read_checked(self._cache.blobs, version, name)
            except BlobCorrupt:
                self._cache.damaged(entry.sha256)
                dropped.append(name)
        return NotCached(
            f"the copy of {version.text} in the cache was damaged and is dropped, {', '.join(dropped)}: pull it once "
            f"while {self._place} answers"
        )


def age_text(known: Known) -> str:
    """How long ago the server said so, for people: "3 hours"."""
    seconds = known.age_seconds
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


class Nowhere(BlobStore):
    """The far store behind a cache when no packet may be sent."""

    def put(self, source: BinaryIO) -> tuple[Digest, int]:
        """Refuse."""
        self._refuse()

    def open(self, digest: Digest) -> BinaryIO:
        """Refuse."""
        self._refuse(digest)

    def fetch(self, digest: Digest, take: Callable[[bytes], object], start: int = 0) -> None:
        """Refuse."""
        self._refuse(digest)

    def has(self, digest: Digest) -> bool:
        """Refuse."""
        self._refuse(digest)

    def digests(self) -> Iterator[Digest]:
        """Refuse."""
        self._refuse()

    def info(self, digest: Digest) -> BlobInfo:
        """Refuse."""
        self._refuse(digest)

    def delete(self, digest: Digest) -> None:
        """Refuse."""
        self._refuse(digest)

    def unfinished(self) -> Iterator[Unfinished]:
        """Refuse."""
        self._refuse()

    def discard(self, unfinished: Unfinished) -> None:
        """Refuse."""
        self._refuse()

    def _refuse(self, digest: Digest | None = None) -> NoReturn:
        what = f"{digest} is not in the cache" if digest is not None else "this needs the bucket"
        raise NotCached(f"{what}, and nothing is fetched offline: pull it once while the bucket answers")
