"""The servicer: messages → nouns, is the caller allowed to, the hub's own verb, nouns → messages.

Every method first asks who calls, then what they may in the namespace they name, and only then looks at the hub: what
is refused says nothing of what exists. Where no namespace is named, what the caller may not read is left out.
"""

# ruff: noqa: N802  # methods are called as the calls of the proto

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version
from typing import Any, Final, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from hub.errors import AdapterNotFound, Forbidden, HubError, QueryInvalid, RefInvalid, ServerBusy, UploadLost
from hub.hub import Hub
from hub.parsing import MAX_FILES, parse_directory
from hub.refs import LATEST, AdapterRef, Alias, Digest
from hub.registry.feed import Feed
from hub.registry.grants import Caller, Grant, anyone
from hub.registry.tokens import Token, TokenStore
from hub.registry.uploads import Uploads, check_file
from hub.remote import messages
from hub.verify import copy_checked
from hub.versions import Event, Problem, Version
from protos.loraplex.v1 import registry_pb2 as pb
from protos.loraplex.v1 import registry_pb2_grpc

CHUNK_BYTES: Final = 1024 * 1024
PART_BYTES: Final = 1024 * 1024  # of manifests in one part of a stream
MAX_PAGE: Final = 1000
MAX_EVENTS: Final = 1000
SIGN_OF_LIFE_SECONDS: Final = 5.0
ACTOR_KEY: Final = "loraplex-actor-bin"
Context = grpc.ServicerContext
T = TypeVar("T")
M = TypeVar("M", bound=Message)


class Observer(Protocol):
    """What is told of the work done."""

    def moved(self, direction: str, count: int) -> None:
        """Bytes went "in" or "out"."""

    def watching(self, change: int) -> None:
        """A watch began (1) or ended (-1)."""


@dataclass(frozen=True)
class ServiceLimits:
    """What one server does at a time."""

    max_watches: int = 128
    max_transfers: int = 64
    max_checks: int = 2  # verify, fsck and sweep read much


class RegistryService(registry_pb2_grpc.RegistryServicer):
    """One hub for many callers. `tokens` None: everybody may do everything."""

    def __init__(
        self, hub: Hub, tokens: TokenStore | None, uploads: Uploads, feed: Feed, observer: Observer,
        limits: ServiceLimits | None = None,
    ) -> None:  # fmt: skip
        limits = limits or ServiceLimits()
        self._hub = hub
        self._tokens = tokens
        self._uploads = uploads
        self._feed = feed
        self._observer = observer
        self._watches = threading.BoundedSemaphore(limits.max_watches)
        self._transfers = threading.BoundedSemaphore(limits.max_transfers)
        self._checks = threading.BoundedSemaphore(limits.max_checks)
        self.closing = threading.Event()

    # Reading

    def WhoAmI(self, request: pb.WhoAmIRequest, context: Context) -> pb.WhoAmIResponse:
        """Whom the audit names, and what they may."""
        caller = self._caller(context)
        return pb.WhoAmIResponse(
            subject=caller.subject, token_id=caller.token_id, grants=_grant_messages(caller.grants),
            expires=caller.expires, server_version=installed_version("loraplex"), last_seq=self._hub.last_seq(),
        )  # fmt: skip

    def Resolve(self, request: pb.ResolveRequest, context: Context) -> pb.VersionResponse:
        """See `Hub.resolve`."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("read", ref.full_name)
        seq = self._hub.last_seq()
        found = self._hub.resolve(ref, request.key if request.HasField("key") else None)
        return pb.VersionResponse(version=messages.version_message(found), last_seq=seq)

    def GetVersion(self, request: pb.GetVersionRequest, context: Context) -> pb.VersionResponse:
        """See `Hub.get`; what the caller may not read is not found."""
        caller = self._caller(context)
        seq = self._hub.last_seq()
        found = self._readable(caller, Digest.parse(request.digest))
        return pb.VersionResponse(version=messages.version_message(found), last_seq=seq)

    def ListVersions(self, request: pb.ListVersionsRequest, context: Context) -> Iterator[pb.VersionsPart]:
        """See `Hub.versions`."""
        caller = self._caller(context)
        found = self._hub.versions(request.pattern if request.HasField("pattern") else None)
        allowed = (version for version in found if caller.may("read", version.full_name))
        for part in _parts(pb.VersionsPart.Found(version=messages.version_message(version)) for version in allowed):
            yield pb.VersionsPart(versions=part)

    def Search(self, request: pb.SearchRequest, context: Context) -> Iterator[pb.VersionsPart]:
        """See `Hub.search`: pages are as full for callers who may read little."""
        caller, query = self._caller(context), messages.query_of(request)
        if not 0 < query.limit <= MAX_PAGE:
            raise QueryInvalid(f"a page has 1 to {MAX_PAGE} versions")
        left, more = query.limit, True
        while left and more:
            page = self._hub.search(replace(query, limit=left))
            more = page.more
            allowed = [version for version in page.versions if caller.may("read", version.full_name)]
            left -= len(allowed)
            if page.versions:
                query = replace(query, after=(page.versions[-1].full_name, page.versions[-1].number))
            found = (
                pb.VersionsPart.Found(
                    version=messages.version_message(version), aliases=page.aliases.get(version.digest, ())
                )
                for version in allowed
            )
            for part in _parts(found):
                yield pb.VersionsPart(versions=part)
        yield pb.VersionsPart(more=more)

    def Lineage(self, request: pb.LineageRequest, context: Context) -> Iterator[pb.LineagePart]:
        """See `Hub.lineage`; relatives that the caller may not read are digests alone, or left out."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("read", ref.full_name)
        found = self._hub.lineage(ref)
        yield pb.LineagePart(version=messages.version_message(found.version), complete=found.complete)
        ancestors = (
            pb.LineagePart.Ancestor(
                digest=each.digest, distance=each.distance, children=each.children,
                version=messages.version_message(each.version)
                if each.version is not None and caller.may("read", each.version.full_name)
                else None,
            )
            for each in found.ancestors
        )  # fmt: skip
        for part in _parts(ancestors):
            yield pb.LineagePart(ancestors=part)
        children = (child for child in found.children if caller.may("read", child.full_name))
        for versions in _parts(messages.version_message(child) for child in children):
            yield pb.LineagePart(children=versions)

    def Aliases(self, request: pb.AliasesRequest, context: Context) -> pb.AliasesResponse:
        """See `Hub.aliases`."""
        caller, name = self._caller(context), AdapterRef.parse(request.full_name).full_name
        caller.require("read", name)
        found = self._hub.aliases(name)
        return pb.AliasesResponse(aliases={alias: messages.alias_message(state) for alias, state in found.items()})

    def ReadFile(self, request: pb.ReadFileRequest, context: Context) -> Iterator[pb.FileChunk]:
        """The bytes of a file from `offset` on; the caller hashes the whole."""
        caller = self._caller(context)
        version = self._readable(caller, Digest.parse(request.digest))
        with _one_of(self._transfers, "transfers"), self._hub.open_file(version, request.filename) as file:
            size = version.manifest.files[request.filename].bytes
            _skip(file, min(request.offset, size))
            while chunk := file.read(CHUNK_BYTES):
                yield pb.FileChunk(data=chunk)
                self._observer.moved("out", len(chunk))

    # Pushing

    def BeginPush(self, request: pb.BeginPushRequest, context: Context) -> pb.BeginPushResponse:
        """What is missing; bytes that this adapter's versions have already need not come again."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("push", ref.full_name)
        owner = _owner(caller, ref)
        missing = []
        for name, digest, _ in _files(request.files):
            if not self._uploads.whole(owner, digest) and not self._hub.holds_file(ref.full_name, digest):
                offset = self._uploads.received(owner, digest)
                missing.append(pb.BeginPushResponse.Missing(name=name, offset=offset))
        return pb.BeginPushResponse(missing=missing)

    def Upload(self, parts: Iterator[pb.UploadRequest], context: Context) -> pb.UploadResponse:
        """Take one file in; cut short, what came is kept."""
        caller = self._caller(context)
        first = next(parts, None)
        if first is None or first.WhichOneof("part") != "begin":
            raise RefInvalid("an upload begins with what is uploaded")
        ref = AdapterRef.parse(first.begin.ref)
        caller.require("push", ref.full_name)
        [(name, digest, size)] = _files([first.begin.file])
        with _one_of(self._transfers, "transfers"):
            have = self._uploads.receive(
                _owner(caller, ref), name, digest, size, first.begin.offset, self._counted(parts)
            )
        return pb.UploadResponse(bytes=have)

    def Publish(self, request: pb.PublishRequest, context: Context) -> pb.PublishResponse:
        """Lay the files out, read them as any adapter is read, and make them a version."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("push", ref.full_name)
        aliases = [Alias.parse(alias).name for alias in request.aliases]
        asked = [*aliases, ref.selector.name] if isinstance(ref.selector, Alias) else aliases
        if any(alias != LATEST for alias in asked):
            caller.require("promote", ref.full_name)
        parents = []
        for text in request.parents:
            parent = AdapterRef.parse(text)
            caller.require("read", parent.full_name)
            parents.append(self._hub.resolve(parent).digest)
        owner, files = _owner(caller, ref), _files(request.files)
        with _one_of(self._transfers, "transfers"), self._uploads.directory() as directory:
            for name, digest, size in files:
                if not self._uploads.place(owner, digest, directory / name):
                    if not self._hub.holds_file(ref.full_name, digest):
                        raise UploadLost(f"{name} is not here any more: it has to be uploaded again")
                    with (directory / name).open("xb") as file:
                        copy_checked(self._hub.storage, digest, size, name, file.write)
            result = self._acting(caller, context).publish(
                _without_paths(parse_directory, directory), ref,
                located=messages.base_of(request.base) if request.HasField("base") else None,
                aliases=aliases, parents=parents, creator=request.creator if request.HasField("creator") else None,
            )  # fmt: skip
        for _, digest, _ in files:
            self._uploads.drop(owner, digest)
        return pb.PublishResponse(
            version=messages.version_message(result.version), created=result.created, warnings=result.warnings
        )

    # Aliases and removal

    def Tag(self, request: pb.TagRequest, context: Context) -> pb.AliasResponse:
        """See `Hub.tag` and `Hub.split`."""
        caller = self._caller(context)
        targets = [(AdapterRef.parse(target.ref), target.weight) for target in request.targets]
        if not targets:
            raise QueryInvalid("an alias needs a version to hold")
        for ref, _ in targets:
            caller.require("promote", ref.full_name)
        expect = request.expect if request.HasField("expect") else None
        hub = self._acting(caller, context)
        if request.split:
            return pb.AliasResponse(state=messages.alias_message(hub.split(targets, request.alias, expect)))
        if len(targets) != 1:
            raise QueryInvalid("only a split alias has several targets")
        version = hub.tag(targets[0][0], request.alias, expect)
        return pb.AliasResponse(version=messages.version_message(version))

    def Promote(self, request: pb.PromoteRequest, context: Context) -> pb.PromoteResponse:
        """See `Hub.promote`."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("promote", ref.full_name)
        made = self._acting(caller, context).promote(ref, request.alias, messages.gate_of(request))
        return pb.PromoteResponse(
            version=messages.version_message(made.version),
            before=messages.version_message(made.before) if made.before is not None else None,
            passed=made.passed,
        )

    def Rollback(self, request: pb.AliasRequest, context: Context) -> pb.AliasResponse:
        """See `Hub.rollback`."""
        hub, name, expect = self._alias_change(request, context)
        return pb.AliasResponse(state=messages.alias_message(hub.rollback(name, request.alias, expect)))

    def Untag(self, request: pb.AliasRequest, context: Context) -> pb.VersionResponse:
        """See `Hub.untag`."""
        hub, name, expect = self._alias_change(request, context)
        return pb.VersionResponse(version=messages.version_message(hub.untag(name, request.alias, expect)))

    def Remove(self, request: pb.RefRequest, context: Context) -> pb.VersionResponse:
        """See `Hub.remove`."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("admin", ref.full_name)
        return pb.VersionResponse(version=messages.version_message(self._acting(caller, context).remove(ref)))

    def Restore(self, request: pb.RefRequest, context: Context) -> pb.VersionResponse:
        """See `Hub.restore`."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("admin", ref.full_name)
        return pb.VersionResponse(version=messages.version_message(self._acting(caller, context).restore(ref)))

    def Sweep(self, request: pb.SweepRequest, context: Context) -> pb.SweepResponse:
        """See `Hub.sweep`."""
        caller = self._caller(context)
        caller.require_everywhere("admin")
        if not (request.retention_seconds >= 0 and request.grace_seconds >= 0):
            raise QueryInvalid("times to keep are from 0 seconds up")
        with _one_of(self._checks, "checks and sweeps"):
            swept = self._acting(caller, context).sweep(
                retention_seconds=request.retention_seconds, grace_seconds=request.grace_seconds,
                dry_run=request.dry_run,
            )  # fmt: skip
        return pb.SweepResponse(
            purged=swept.purged, blobs=swept.blobs, leftovers=swept.leftovers, bytes=swept.bytes
        )  # fmt: skip

    def TakeLease(self, request: pb.LeaseRequest, context: Context) -> pb.LeaseResponse:
        """See `Hub.lease`."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("push", ref.full_name)
        seconds = request.seconds if request.HasField("seconds") else None
        return messages.lease_message(self._acting(caller, context).lease(ref, request.holder, seconds))

    def ReleaseLease(self, request: pb.LeaseRequest, context: Context) -> pb.ReleaseLeaseResponse:
        """See `Hub.release`."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("push", ref.full_name)
        self._acting(caller, context).release(ref, request.holder)
        return pb.ReleaseLeaseResponse()

    def ListLeases(self, request: pb.ListLeasesRequest, context: Context) -> pb.ListLeasesResponse:
        """See `Hub.leases`."""
        caller, name = self._caller(context), self._asked_name(request)
        if name is not None:
            caller.require("read", name)
        found = [lease for lease in self._hub.leases(name) if caller.may("read", lease.full_name)]
        return pb.ListLeasesResponse(leases=map(messages.lease_message, found))

    # Events and checks

    def Events(self, request: pb.EventsRequest, context: Context) -> pb.EventsResponse:
        """See `Hub.events`; those of adapters that the caller may not read are left out."""
        caller, name = self._caller(context), self._asked_name(request)
        if name is not None:
            caller.require("read", name)
        limit, since = min(request.limit, MAX_EVENTS), request.since_seq
        found: list[Event] = []
        while len(found) < limit and (batch := self._hub.events(since, MAX_EVENTS, name)):
            found += [event for event in batch if caller.may("read", event.full_name)]
            since = batch[-1].seq
        return pb.EventsResponse(events=map(messages.event_message, found[:limit]))

    def Watch(self, request: pb.WatchRequest, context: Context) -> Iterator[pb.WatchResponse]:
        """See `Hub.watch`; ends with the token's life."""
        caller, since = self._caller(context), request.since_seq
        with _one_of(self._watches, "watches"):
            self._observer.watching(1)
            try:
                yield pb.WatchResponse()
                while context.is_active() and not self.closing.is_set():
                    for event in self._hub.events(since, MAX_EVENTS):
                        if caller.may("read", event.full_name):
                            yield pb.WatchResponse(event=messages.event_message(event))
                        since = event.seq
                    if not self._feed.wait_beyond(since, SIGN_OF_LIFE_SECONDS):
                        yield pb.WatchResponse()
                    caller = self._caller(context)  # a token revoked meanwhile ends the watch
            finally:
                self._observer.watching(-1)

    def Check(self, request: pb.CheckRequest, context: Context) -> Iterator[pb.CheckPart]:
        """See `Hub.verify` and `Hub.fsck`."""
        caller = self._caller(context)
        ref = AdapterRef.parse(request.ref) if request.HasField("ref") else None
        if request.kind == pb.CheckRequest.KIND_VERIFY and ref is not None:
            caller.require("read", ref.full_name)
            work: Callable[[Any], list[Problem]] = lambda progress: self._hub.verify(ref, progress)  # noqa: E731
        elif request.kind in (pb.CheckRequest.KIND_VERIFY, pb.CheckRequest.KIND_FSCK) and ref is None:
            caller.require_everywhere("admin")
            work = self._hub.fsck if request.kind == pb.CheckRequest.KIND_FSCK else self._verify_all
        else:
            raise QueryInvalid("a check is verify, of a version or of all, or fsck")
        with _one_of(self._checks, "checks and sweeps"):
            yield from _told(work)

    # Tokens

    def CreateToken(self, request: pb.CreateTokenRequest, context: Context) -> pb.CreateTokenResponse:
        """A new token; for admins of all namespaces."""
        caller = self._caller(context)
        store = self._token_store(caller)
        grants = [Grant.of(grant.namespace, grant.roles) for grant in request.grants]
        lifetime = request.lifetime_seconds if request.HasField("lifetime_seconds") else None
        token, secret = store.create(request.subject, grants, lifetime, caller.subject)
        return pb.CreateTokenResponse(token=_token_message(token), secret=secret)

    def ListTokens(self, request: pb.ListTokensRequest, context: Context) -> pb.ListTokensResponse:
        """All tokens, without their secrets; for admins of all namespaces."""
        return pb.ListTokensResponse(tokens=map(_token_message, self._token_store(self._caller(context)).list()))

    def RevokeToken(self, request: pb.RevokeTokenRequest, context: Context) -> pb.RevokeTokenResponse:
        """Refuse a token from now on; for admins of all namespaces."""
        caller = self._caller(context)
        token = self._token_store(caller).revoke(request.id, caller.subject)
        return pb.RevokeTokenResponse(token=_token_message(token))

    # What the methods share

    def _caller(self, context: Context) -> Caller:
        if self._tokens is None:
            return anyone()
        values = [value for key, value in context.invocation_metadata() if key == "authorization"]
        scheme, _, text = str(values[0]).partition(" ") if len(values) == 1 else ("", "", "")
        return self._tokens.authenticate(text if scheme.lower() == "bearer" else "")

    def _acting(self, caller: Caller, context: Context) -> Hub:
        """The hub, writing as the token's subject, and as whom the client says it acts for."""
        said = [value for key, value in context.invocation_metadata() if key == ACTOR_KEY]
        try:
            value = said[0] if said else b""
            name = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise RefInvalid("the actor is no text") from error
        if len(name) > 200 or not name.isprintable():
            raise RefInvalid("an actor is a printable line of at most 200 characters")
        if self._tokens is None:
            return self._hub.acting_as(name or caller.subject)
        return self._hub.acting_as(f"{caller.subject} for {name}" if name else caller.subject)

    def _readable(self, caller: Caller, digest: Digest) -> Version:
        unknown = AdapterNotFound(f"there is no version {digest} in this hub")
        try:
            version = self._hub.get(digest)
        except AdapterNotFound as error:
            # "Removed" is told only to who could read it: the message names the version.
            if caller.may_everywhere("read"):
                raise
            raise unknown from error
        if not caller.may("read", version.full_name):
            raise unknown
        return version

    def _alias_change(self, request: pb.AliasRequest, context: Context) -> tuple[Hub, str, int | None]:
        caller, name = self._caller(context), AdapterRef.parse(request.full_name).full_name
        caller.require("promote", name)
        return self._acting(caller, context), name, request.expect if request.HasField("expect") else None

    def _asked_name(self, request: Any) -> str | None:
        return AdapterRef.parse(request.full_name).full_name if request.HasField("full_name") else None

    def _token_store(self, caller: Caller) -> TokenStore:
        if self._tokens is None:
            raise Forbidden("this server runs without tokens")
        caller.require_everywhere("admin")
        return self._tokens

    def _verify_all(self, progress: Any) -> list[Problem]:
        return self._hub.verify(None, progress)

    def _counted(self, parts: Iterator[pb.UploadRequest]) -> Iterator[bytes]:
        for part in parts:
            if part.WhichOneof("part") != "data":
                raise RefInvalid("after its beginning an upload has data alone")
            self._observer.moved("in", len(part.data))
            yield part.data


def _files(sent: Iterable[pb.PushedFile]) -> list[tuple[str, Digest, int]]:
    files = []
    for file in sent:
        check_file(file.name, file.bytes)
        files.append((file.name, Digest.parse(file.sha256), file.bytes))
    if len({name for name, _, _ in files}) < len(files) or len(files) > MAX_FILES:
        raise RefInvalid("a file is named twice")
    return files


def _owner(caller: Caller, ref: AdapterRef) -> str:
    return f"{caller.subject}\n{ref.full_name}"


def _without_paths(read: Callable[..., T], directory: Any) -> T:
    """What `read` returns; where it refuses, without this machine's directory in the message."""
    try:
        return read(directory)
    except HubError as error:
        raise type(error)(str(error).replace(f"{directory}/", "").replace(str(directory), "the push")) from error


def _skip(file: Any, count: int) -> None:
    if file.seekable():
        file.seek(count)
        return
    while count and (passed := len(file.read(min(count, CHUNK_BYTES)))):
        count -= passed


class _one_of:  # noqa: N801  # reads as a statement: with _one_of(...)
    """One of a few places, or ServerBusy at once."""

    def __init__(self, places: threading.BoundedSemaphore, what: str) -> None:
        self._places, self._what = places, what

    def __enter__(self) -> None:
        if not self._places.acquire(blocking=False):
            raise ServerBusy(f"the server has as many {self._what} running as it may; try again later")

    def __exit__(self, *error: object) -> None:
        self._places.release()


def _told(work: Callable[[Any], list[Problem]]) -> Iterator[pb.CheckPart]:
    """The work's progress as it comes, at most ten times a second, then what it found."""
    told: queue.SimpleQueue[pb.CheckPart | BaseException | None] = queue.SimpleQueue()
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1 or done == total:
            last = time.monotonic()
            told.put(pb.CheckPart(progress=pb.CheckPart.Progress(what=what, done=done, total=total)))

    def run() -> None:
        try:
            for found in work(progress):
                problem = pb.CheckPart.Problem(
                    version=found.version, file=found.file, reason=found.reason, message=found.message
                )
                told.put(pb.CheckPart(problem=problem))
            told.put(None)
        except BaseException as error:
            told.put(error)

    thread = threading.Thread(target=run, name="loraplex-check", daemon=True)
    thread.start()
    while (part := told.get()) is not None:
        if isinstance(part, BaseException):
            raise part
        yield part
    thread.join()


def _parts(sent: Iterable[M]) -> Iterator[list[M]]:
    """Messages in lots that fit into one message."""
    part: list[M] = []
    held = 0
    for message in sent:
        size = message.ByteSize()
        if part and held + size > PART_BYTES:
            yield part
            part, held = [], 0
        part.append(message)
        held += size
    if part:
        yield part


def _grant_messages(grants: Iterable[Grant]) -> list[pb.Grant]:
    return [pb.Grant(namespace=grant.namespace, roles=grant.roles) for grant in grants]


def _token_message(token: Token) -> pb.TokenInfo:
    return pb.TokenInfo(
        id=token.id, subject=token.subject, grants=_grant_messages(token.grants), created=token.created,
        created_by=token.created_by, expires=token.expires, revoked=token.revoked, revoked_by=token.revoked_by,
    )  # fmt: skip
