"""The facade over gRPC: the same contract as `hub.hub.Hub`, on a server's word and verified here byte by byte."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import grpc

from hub import pull
from hub.actor import current_user
from hub.base import base_identity
from hub.errors import BlobCorrupt, HubError, HubUnavailable, RefInvalid, UploadLost
from hub.fingerprint import known_shapes
from hub.gate import Gate, Promotion
from hub.hub import check_has, checked_holder, identity_of, pushed_aliases
from hub.lineage import Ancestor, Lineage, relation
from hub.parsing import parse_directory
from hub.progress import Progress
from hub.refs import AdapterRef, Alias, Digest
from hub.remote import credentials, messages
from hub.remote.address import Address
from hub.remote.cache import Cache, Known
from hub.remote.connection import Connection, ServerAway
from hub.remote.status import error_of
from hub.remote.transfer import fetch, upload
from hub.search import Page, Query
from hub.splitting import checked_split
from hub.sweep import GRACE_SECONDS, RETENTION_SECONDS
from hub.verify import read_checked
from hub.versions import AliasState, Event, Lease, Problem, PushResult, Swept, Version
from protos.loraplex.v1 import registry_pb2 as pb

if TYPE_CHECKING:
    from hub.diff import Diff
    from hub.facade import HubFacade

log = logging.getLogger(__name__)
MAX_STALE_SECONDS: Final = 7 * 24 * 3600.0  # an alias older than this is not used while the server is away
_MAX_NUMBER: Final = 2**32 - 1
_ROUNDS: Final = 5
_WATCH_AHEAD: Final = 1000


class RemoteHub:
    """A shared hub, opened; methods are safe to call from several threads and raise what `hub.hub.Hub`'s do.

    Beside those: Unauthenticated, Forbidden, ServerBusy. While the server is away `resolve`, `get`, `read_file`,
    `pull` and `last_seq` answer from the cache what they answered before, with a warning in the log that says how old
    it is; everything else raises HubUnavailable.
    """

    def __init__(self, connection: Connection, cache: Cache, *, actor: str | None = None) -> None:
        self._connection = connection
        self._cache = cache
        # Without a token nobody else says who writes.
        self._actor = actor or (None if connection.has_token else current_user())

    @classmethod
    def open(cls, url: str) -> Self:
        """The hub at a grpc:// or grpcs:// URL, with this user's token and cache; connects when first used.

        Raises HubUnavailable, CredentialsUnsafe.
        """
        address = Address.parse(url)
        return cls(Connection(address, credentials.token_for(address)), Cache.of(address))

    def acting_as(self, actor: str | None) -> RemoteHub:
        """This hub; the audit says that what is written through the result is written for `actor`."""
        return RemoteHub(self._connection, self._cache, actor=actor)

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def who_am_i(self) -> pb.WhoAmIResponse:
        """Whom the server takes this caller for, with which grants."""
        answer: pb.WhoAmIResponse = self._call("WhoAmI", pb.WhoAmIRequest())
        return answer

    @property
    def connection(self) -> Connection:
        """For the verbs that only a shared hub has."""
        return self._connection

    # Versions

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

        Files that a version of this adapter has already are not sent again.
        """
        target = _parsed(ref)
        wanted = [Alias.parse(alias).name for alias in aliases]
        pushed_aliases(target)  # refuses a number before anything is read
        made_from = [str(_exact(self._resolve_now(_parsed(parent)))) for parent in parents]
        located, hashed = base_identity(base, progress=progress) if base is not None else (None, None)
        adapter = parse_directory(Path(directory), progress=progress)
        identity = identity_of(adapter, located)
        shapes = hashed.shapes if hashed else identity.fingerprint and known_shapes(identity.fingerprint)
        if shapes:
            adapter.check_binds(shapes)
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
        return PushResult(self._version(answer.version), answer.created, tuple(answer.warnings))

    def resolve(self, ref: AdapterRef | str, key: str | None = None) -> Version:
        """See `Hub.resolve`; while the server is away what it was when last asked, with its age in the log."""
        parsed = _parsed(ref)
        try:
            return self._resolve_now(parsed, key)
        except ServerAway as error:
            return self._recalled(_name(parsed, key), error, moves=isinstance(parsed.selector, Alias))

    def get(self, digest: Digest | str) -> Version:
        """See `Hub.get`; while the server is away from the cache."""
        wanted = Digest.parse(digest)
        try:
            answer = self._call("GetVersion", pb.GetVersionRequest(digest=wanted))
        except ServerAway as error:
            return self._recalled(wanted, error, moves=False)
        version = self._version(answer.version)
        if version.digest != wanted:
            raise BlobCorrupt(f"the server answered {version.digest} when asked for {wanted}")
        self._cache.remember(wanted, version, answer.last_seq)
        return version

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
        related = relation(self.lineage(_exact(first)), self.lineage(_exact(second)))
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

    def versions(self, pattern: str | None = None) -> list[Version]:
        """See `Hub.versions`; those that the caller may read."""
        parts = self._connection.stream("ListVersions", pb.ListVersionsRequest(pattern=pattern), self._actor)
        return [self._version(found.version) for part in parts for found in part.versions]

    def search(self, query: Query) -> Page:
        """See `Hub.search`; among what the caller may read."""
        versions: list[Version] = []
        aliases: dict[Digest, tuple[str, ...]] = {}
        more = False
        for part in self._connection.stream("Search", messages.query_message(query), self._actor):
            for found in part.versions:
                version = self._version(found.version)
                versions.append(version)
                if found.aliases:
                    aliases[version.digest] = tuple(found.aliases)
            more = part.more
        return Page(tuple(versions), aliases, more)

    def lineage(self, ref: AdapterRef | str) -> Lineage:
        """See `Hub.lineage`; relatives that the caller may not read are digests alone, or left out."""
        version, complete = None, True
        ancestors: list[Ancestor] = []
        children: list[Version] = []
        for part in self._connection.stream("Lineage", pb.LineageRequest(ref=str(_parsed(ref))), self._actor):
            if part.HasField("version"):
                version, complete = self._version(part.version), part.complete
            for each in part.ancestors:
                known = self._version(each.version) if each.HasField("version") else None
                through = tuple(map(Digest.parse, each.children))
                ancestors.append(Ancestor(Digest.parse(each.digest), known, each.distance, through))
            children += map(self._version, part.children)
        if version is None:
            raise HubUnavailable("the server's answer ended early")
        return Lineage(version, tuple(ancestors), tuple(children), complete)

    # Aliases

    def aliases(self, full_name: str) -> dict[str, AliasState]:
        """See `Hub.aliases`."""
        answer = self._call("Aliases", pb.AliasesRequest(full_name=_parsed(full_name).full_name))
        return {alias: messages.alias_of(answer.aliases[alias]) for alias in sorted(answer.aliases)}

    def tag(self, ref: AdapterRef | str, alias: str, expect: int | None = None) -> Version:
        """See `Hub.tag`."""
        target = pb.TagRequest.Target(ref=str(_parsed(ref)), weight=1)
        request = pb.TagRequest(targets=[target], alias=Alias.parse(alias).name, expect=expect)
        return self._version(self._call("Tag", request).version)

    def split(
        self, targets: Sequence[tuple[AdapterRef | str, int]], alias: str, expect: int | None = None
    ) -> AliasState:
        """See `Hub.split`."""
        checked = checked_split([(_parsed(ref), weight) for ref, weight in targets])
        wanted = [pb.TagRequest.Target(ref=str(ref), weight=weight) for ref, weight in checked]
        request = pb.TagRequest(targets=wanted, alias=Alias.parse(alias).name, expect=expect, split=True)
        return messages.alias_of(self._call("Tag", request).state)

    def promote(self, ref: AdapterRef | str, alias: str, gate: Gate) -> Promotion:
        """See `Hub.promote`; the server compares the numbers."""
        request = messages.gate_request(str(_parsed(ref)), Alias.parse(alias).name, gate)
        answer = self._call("Promote", request)
        before = self._version(answer.before) if answer.HasField("before") else None
        return Promotion(self._version(answer.version), before, tuple(answer.passed))

    def rollback(self, full_name: str, alias: str, expect: int | None = None) -> AliasState:
        """See `Hub.rollback`."""
        return messages.alias_of(self._call("Rollback", _alias_request(full_name, alias, expect)).state)

    def untag(self, full_name: str, alias: str, expect: int | None = None) -> Version:
        """See `Hub.untag`."""
        return self._version(self._call("Untag", _alias_request(full_name, alias, expect)).version)

    # Removal

    def remove(self, ref: AdapterRef | str) -> Version:
        """See `Hub.remove`."""
        return self._version(self._call("Remove", pb.RefRequest(ref=str(_parsed(ref)))).version)

    def restore(self, ref: AdapterRef | str) -> Version:
        """See `Hub.restore`."""
        return self._version(self._call("Restore", pb.RefRequest(ref=str(_parsed(ref)))).version)

    def sweep(
        self,
        *,
        retention_seconds: float = RETENTION_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        dry_run: bool = False,
    ) -> Swept:
        """See `Hub.sweep`."""
        request = pb.SweepRequest(retention_seconds=retention_seconds, grace_seconds=grace_seconds, dry_run=dry_run)
        answer = self._connection.call("Sweep", request, self._actor, seconds=None)
        return Swept(tuple(answer.purged), answer.blobs, answer.leftovers, answer.bytes)

    def lease(self, ref: AdapterRef | str, holder: str, seconds: float | None = None) -> Lease:
        """See `Hub.lease`."""
        request = pb.LeaseRequest(ref=str(_parsed(ref)), holder=checked_holder(holder), seconds=seconds)
        return messages.lease_of(self._call("TakeLease", request))

    def release(self, ref: AdapterRef | str, holder: str) -> None:
        """See `Hub.release`."""
        self._call("ReleaseLease", pb.LeaseRequest(ref=str(_parsed(ref)), holder=checked_holder(holder)))

    def leases(self, full_name: str | None = None) -> list[Lease]:
        """See `Hub.leases`; of what the caller may read."""
        name = _parsed(full_name).full_name if full_name is not None else None
        return [
            messages.lease_of(each) for each in self._call("ListLeases", pb.ListLeasesRequest(full_name=name)).leases
        ]

    # Events and checks

    def events(self, since_seq: int = 0, limit: int = 1000, full_name: str | None = None) -> list[Event]:
        """See `Hub.events`; of what the caller may read, so that numbers may be left out."""
        name = _parsed(full_name).full_name if full_name is not None else None
        found: list[Event] = []
        while len(found) < limit:
            wanted = min(limit - len(found), 1000)
            request = pb.EventsRequest(since_seq=_seq(since_seq), limit=wanted, full_name=name)
            batch = list(map(messages.event_of, self._call("Events", request).events))
            found += batch
            if len(batch) < wanted:
                break
            since_seq = batch[-1].seq
        return found

    def last_seq(self) -> int:
        """See `Hub.last_seq`. While the server is away a number at which the cache was still right.

        Whoever watches from there hears of everything that changed what the cache knows.
        """
        try:
            return int(self.who_am_i().last_seq)
        except ServerAway:
            oldest = self._cache.oldest_seq()
            if oldest is None:
                raise
            log.warning("the hub's server is away; events will be followed from number %d", oldest)
            return oldest

    def watch(self, since_seq: int, stop: threading.Event, poll_seconds: float = 0.2) -> Iterator[Event]:
        """See `Hub.watch`; raises HubUnavailable when the connection ends: go on after the last event seen."""
        if stop.is_set():
            return
        arrived: queue.Queue[Event | HubError | None] = queue.Queue(_WATCH_AHEAD)
        call = self._connection.stub.Watch(
            pb.WatchRequest(since_seq=_seq(since_seq)), metadata=self._connection.metadata(self._actor)
        )
        thread = threading.Thread(target=_receive, args=(call, arrived), name="loraplex-remote-watch", daemon=True)
        thread.start()
        try:
            while not stop.is_set():
                try:
                    event = arrived.get(timeout=poll_seconds)
                except queue.Empty:
                    continue
                if event is None:
                    raise HubUnavailable("the hub's server ended the watch: it is shutting down")
                if isinstance(event, HubError):
                    raise event
                yield event
        finally:
            call.cancel()
            while thread.is_alive():  # it may wait for room
                try:
                    arrived.get(timeout=0.01)
                except queue.Empty:
                    thread.join(0.01)

    def verify(self, ref: AdapterRef | str | None = None, progress: Progress | None = None) -> list[Problem]:
        """See `Hub.verify`; the server reads its own storage."""
        text = str(_parsed(ref)) if ref is not None else None
        return self._check(pb.CheckRequest(kind=pb.CheckRequest.KIND_VERIFY, ref=text), progress)

    def fsck(self, progress: Progress | None = None) -> list[Problem]:
        """See `Hub.fsck`."""
        return self._check(pb.CheckRequest(kind=pb.CheckRequest.KIND_FSCK), progress)

    # What the methods share

    def _call(self, method: str, request: Any) -> Any:
        return self._connection.call(method, request, self._actor)

    def _version(self, message: pb.AdapterVersion) -> Version:
        return messages.version_of(message)

    def _resolve_now(self, ref: AdapterRef, key: str | None = None) -> Version:
        answer = self._call("Resolve", pb.ResolveRequest(ref=str(ref), key=key))
        version = self._version(answer.version)
        if version.full_name != ref.full_name or not _fits(ref, version):
            raise BlobCorrupt(f"the server answered {version.text} when asked for {ref}")
        self._cache.remember(_name(ref, key), version, answer.last_seq)
        self._cache.remember(version.digest, version, answer.last_seq)
        return version

    def _recalled(self, name: str, error: ServerAway, *, moves: bool) -> Version:
        found = self._cache.recall(name)
        if found is None:
            raise HubUnavailable(f"{error}; {name} is not in the cache") from error
        version, known = found
        if moves and known.age_seconds > MAX_STALE_SECONDS:
            raise HubUnavailable(
                f"{error}; {name} was {version.text} {_age(known)} ago, which is too long to go by: name {version.text}"
            ) from error
        log.warning("the hub's server is away; %s is %s, as of %s ago", name, version.text, _age(known))
        return version

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

    def _check(self, request: pb.CheckRequest, progress: Progress | None) -> list[Problem]:
        problems = []
        for part in self._connection.stream("Check", request, self._actor):
            if part.HasField("problem"):
                problems.append(messages.problem_of(part.problem))
            elif progress is not None:
                progress(part.progress.what, part.progress.done, part.progress.total)
        return problems


def _receive(call: Any, arrived: queue.Queue[Event | HubError | None]) -> None:
    """Move a watch's events into the queue, then how it ended."""
    try:
        for message in call:
            if message.HasField("event"):
                arrived.put(messages.event_of(message.event))
        arrived.put(None)
    except grpc.RpcError as error:
        arrived.put(error_of(error))
    except HubError as error:
        arrived.put(error)


def _parsed(ref: AdapterRef | str) -> AdapterRef:
    return AdapterRef.parse(ref) if isinstance(ref, str) else ref


def _exact(version: Version) -> AdapterRef:
    return replace(AdapterRef.parse(version.full_name), selector=version.digest)


def _fits(ref: AdapterRef, version: Version) -> bool:
    """Whether a version can be what an immutable reference names."""
    if isinstance(ref.selector, Alias):
        return True
    return ref.selector == version.digest if isinstance(ref.selector, Digest) else ref.selector.number == version.number


def _name(ref: AdapterRef, key: str | None) -> str:
    return str(ref) if key is None else f"{ref} for {key}"


def _alias_request(full_name: str, alias: str, expect: int | None) -> pb.AliasRequest:
    return pb.AliasRequest(full_name=_parsed(full_name).full_name, alias=Alias.parse(alias).name, expect=expect)


def _seq(number: int) -> int:
    if number < 0:
        raise RefInvalid("event numbers are from 0 up")
    return min(number, 2**63 - 1)


def _age(known: Known) -> str:
    seconds = known.age_seconds
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _keeps_the_contract(hub: RemoteHub) -> HubFacade:
    """Checked by mypy, never called."""
    return hub
