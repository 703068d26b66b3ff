"""The remote facade's bytes: push, pull, files of versions, comparisons; all verified here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from hub import pull
from hub.arguments import check_has
from hub.base import base_identity
from hub.errors import BlobCorrupt, UploadLost
from hub.fingerprint import known_shapes
from hub.lineage import relation
from hub.parsing import check_directory
from hub.progress import Progress
from hub.publishing import identity_of, pushed_aliases
from hub.refs import AdapterRef, Alias, Digest
from hub.remote import messages
from hub.remote.calls import exact, parsed
from hub.remote.reading import RemoteReading
from hub.remote.sending import Sending
from hub.remote.transfer import check_published, fetch, upload
from hub.verify import read_checked
from hub.versions import PushResult, Version
from protos.loraplex.v1 import registry_pb2 as pb

if TYPE_CHECKING:
    from hub.diff import Diff

_ROUNDS: Final = 5


class RemoteContent(RemoteReading):
    """What is in the cache is checked again and not fetched again."""

    def push(
        self,
        directory: Path | str,
        ref: AdapterRef | str,
        *,
        base: str | None = None,
        aliases: Sequence[str] = (),
        parents: Sequence[AdapterRef | str] = (),
        creator: str | None = None,
        progress: Progress | None = None,
    ) -> PushResult:
        """See `Hub.push`: read and checked here, against the base that lies here, and read once more by the server.

        The files are on their way while their numbers are looked at; where those are refused nothing is published.

        Files that a version of this adapter has already are not sent again.
        """
        target = parsed(ref)
        wanted = [Alias.parse(alias).name for alias in aliases]
        pushed_aliases(target)  # refuses a number before anything is read
        made_from = [str(exact(self._resolve_now(parsed(parent)))) for parent in parents]
        located, hashed = base_identity(base, progress=progress) if base is not None else (None, None)
        # Nobody sees what is sent before it is published, which is asked for when the checks have passed.
        with Sending(self._connection, Path(directory), str(target), self._actor, progress) as sending:
            adapter = check_directory(Path(directory), progress=progress, hashed=sending.begin)
            identity = identity_of(adapter, located)
            shapes = hashed.shapes if hashed else identity.fingerprint and known_shapes(identity.fingerprint)
            if shapes:
                adapter.check_binds(shapes)
            sending.finish()
        files = list(adapter.files.values())
        request = pb.PublishRequest(
            ref=str(target),
            files=[pb.PushedFile(name=file.name, sha256=file.sha256, bytes=file.bytes) for file in files],
            base=messages.base_message(located) if located is not None else None,
            aliases=wanted,
            parents=made_from,
            creator=creator,
        )
        for attempt in range(_ROUNDS):
            if attempt:
                upload(self._connection, adapter.directory, files, str(target), self._actor, progress)
            try:
                # Said again after a cut it changes nothing: the same content is the same version.
                answer = self._connection.persist(
                    lambda: self._connection.call("Publish", request, self._actor, seconds=None), lambda: 0
                )
                break
            except UploadLost:
                if attempt + 1 == _ROUNDS:
                    raise
        version = check_published(self._version(answer.version), target.full_name, files)
        return PushResult(version, answer.created, tuple(answer.warnings))

    def pull(self, ref: AdapterRef | str, directory: Path | str, progress: Progress | None = None) -> Version:
        """See `Hub.pull`; what is in the cache is not fetched again, and what was cut goes on where it ended."""
        version = self.resolve(ref)
        pull.check_target(Path(directory))
        for attempt in ("from the cache", "anew"):
            self._fetch_all(version, progress)
            try:
                pull.write_directory(self._cache.blobs, version, Path(directory), progress)
                break
            except BlobCorrupt:
                if attempt == "anew":
                    raise
                self._drop_damaged(version)
        return version

    def read_file(self, version: Version | Digest | str, filename: str) -> bytes:
        """See `Hub.read_file`; what is in the cache is checked again and needs no server."""
        found = version if isinstance(version, Version) else self.get(version)
        check_has(found, filename)
        self._fetch(found, filename)
        try:
            return read_checked(self._cache.blobs, found, filename)
        except BlobCorrupt:
            self._cache.damaged(found.manifest.files[filename].sha256)
            self._fetch(found, filename)
            return read_checked(self._cache.blobs, found, filename)

    def diff(self, a: AdapterRef | str, b: AdapterRef | str) -> Diff:
        """See `Hub.diff`; compared here, from verified copies."""
        from hub.diff import compare  # needs numpy's linear algebra, which only this method does

        first, second = self.resolve(a), self.resolve(b)
        related = relation(self.lineage(exact(first)), self.lineage(exact(second)))
        for attempt in ("from the cache", "anew"):
            for version in (first, second):
                self._fetch_all(version, None)
            try:
                return compare(self._cache.blobs, first, second, related)
            except BlobCorrupt:
                if attempt == "anew":
                    raise
                self._drop_damaged(first)
                self._drop_damaged(second)
        raise AssertionError("the second attempt returns or raises")

    def _fetch(self, version: Version, filename: str) -> None:
        fetch(self._connection, self._cache, version, filename, self._actor)
        self._cache.trim(frozenset(entry.sha256 for entry in version.manifest.files.values()) | {version.digest})

    def _fetch_all(self, version: Version, progress: Progress | None) -> None:
        files = version.manifest.files
        total, before = sum(entry.bytes for entry in files.values()), 0
        for name, entry in files.items():

            def told(done: int, before: int = before) -> None:
                if progress is not None:
                    progress("fetching", before + done, total)

            fetch(self._connection, self._cache, version, name, self._actor, told)
            before += entry.bytes
            told(0, before)
        self._cache.trim(frozenset(entry.sha256 for entry in files.values()) | {version.digest})

    def _drop_damaged(self, version: Version) -> None:
        for name, entry in version.manifest.files.items():
            try:
                read_checked(self._cache.blobs, version, name)
            except BlobCorrupt:
                self._cache.damaged(entry.sha256)
