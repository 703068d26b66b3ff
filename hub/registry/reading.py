"""The calls that read: what exists, what names mean, and the bytes of files."""

# ruff: noqa: N802  # methods are called as the calls of the proto

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version as installed_version
from typing import Any

from hub.errors import QueryInvalid
from hub.refs import AdapterRef, Digest
from hub.registry.access import Access, Context, check_wanted, one_of
from hub.registry.parts import in_parts
from hub.registry.token_calls import grant_messages
from hub.remote import messages
from hub.remote.connection import CHUNK_BYTES
from hub.search import Query
from hub.verify import manifest_bytes
from hub.versions import Version
from protos.loraplex.v1 import registry_pb2 as pb


class ReadingCalls(Access):
    """WhoAmI, Resolve, GetVersion, ListVersions, Search, Lineage, Aliases, ReadFile."""

    def WhoAmI(self, request: pb.WhoAmIRequest, context: Context) -> pb.WhoAmIResponse:
        """Whom the audit names, and what they may."""
        caller = self._caller(context)
        return pb.WhoAmIResponse(
            subject=caller.subject, token_id=caller.token_id, grants=grant_messages(caller.grants),
            expires=caller.expires, server_version=installed_version("loraplex"), last_seq=self._hub.last_seq(),
        )  # fmt: skip

    def Resolve(self, request: pb.ResolveRequest, context: Context) -> pb.VersionResponse:
        """See `Hub.resolve`."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("read", ref.full_name)
        found, seq = self._hub.entries.resolve_at(ref, request.key if request.HasField("key") else None)
        # The caller parses the manifest, and this is the call that is made most.
        version = pb.AdapterVersion(
            full_name=found.full_name, number=found.number, digest=found.digest,
            manifest=manifest_bytes(self._hub.storage, found),
        )  # fmt: skip
        return pb.VersionResponse(version=version, last_seq=seq)

    def GetVersion(self, request: pb.GetVersionRequest, context: Context) -> pb.VersionResponse:
        """See `Hub.get`; what the caller may not read is not found."""
        caller = self._caller(context)
        seq = self._hub.last_seq()
        found = self._readable(caller, Digest.parse(request.digest))
        return pb.VersionResponse(version=messages.version_message(found), last_seq=seq)

    def ListVersions(self, request: pb.ListVersionsRequest, context: Context) -> Iterator[pb.VersionsPart]:
        """See `Hub.versions`; read and sent a page at a time, however many they are."""
        caller = self._caller(context)
        query, more = Query(request.pattern if request.HasField("pattern") else None, limit=messages.MAX_PAGE), True
        while more:
            check_wanted(context)
            page = self._hub.search(query)
            more = page.more
            if page.versions:
                query = replace(query, after=_last(page.versions))
            allowed = (version for version in page.versions if caller.may("read", version.full_name))
            found = (pb.VersionsPart.Found(version=messages.version_message(version)) for version in allowed)
            for part in in_parts(found):
                yield pb.VersionsPart(versions=part)

    def Search(self, request: pb.SearchRequest, context: Context) -> Iterator[pb.VersionsPart]:
        """See `Hub.search`: pages are as full for callers who may read little."""
        caller, query = self._caller(context), messages.query_of(request)
        if not 0 < query.limit <= messages.MAX_PAGE:
            raise QueryInvalid(f"a page has 1 to {messages.MAX_PAGE} versions")
        left, more = query.limit, True
        sees_all = caller.may_everywhere("read")
        while left and more:
            check_wanted(context)
            # Who may read few of many still costs few queries.
            page = self._hub.search(replace(query, limit=left if sees_all else messages.MAX_PAGE))
            allowed = [version for version in page.versions if caller.may("read", version.full_name)]
            more = page.more or len(allowed) > left
            del allowed[left:]
            left -= len(allowed)
            if page.versions:
                query = replace(query, after=_last(page.versions))
            found = (
                pb.VersionsPart.Found(
                    version=messages.version_message(version), aliases=page.aliases.get(version.digest, ())
                )
                for version in allowed
            )
            for part in in_parts(found):
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
        for part in in_parts(ancestors):
            yield pb.LineagePart(ancestors=part)
        children = (child for child in found.children if caller.may("read", child.full_name))
        for versions in in_parts(messages.version_message(child) for child in children):
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
        with one_of(self._transfers, "transfers"), self._hub.open_file(version, request.filename) as file:
            size = version.manifest.files[request.filename].bytes
            _skip(file, min(request.offset, size))
            while chunk := file.read(CHUNK_BYTES):
                yield pb.FileChunk(data=chunk)
                self._observer.moved("out", len(chunk))


def _skip(file: Any, count: int) -> None:
    if file.seekable():
        file.seek(count)
        return
    while count and (passed := len(file.read(min(count, CHUNK_BYTES)))):
        count -= passed


def _last(versions: Sequence[Version]) -> tuple[str, int]:
    return versions[-1].full_name, versions[-1].number
