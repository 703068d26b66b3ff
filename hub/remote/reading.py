"""The remote facade's reading: names, versions and their relatives."""

from __future__ import annotations

from dataclasses import replace

from hub.errors import BlobCorrupt, HubUnavailable, NotFound
from hub.lineage import Ancestor, Lineage
from hub.refs import AdapterRef, Alias, Digest
from hub.remote import messages
from hub.remote.calls import RemoteCalls, name_in_cache, parsed
from hub.remote.connection import ServerAway
from hub.search import Page, Query
from hub.versions import Version
from protos.loraplex.v1 import registry_pb2 as pb


class RemoteReading(RemoteCalls):
    """`resolve` and `get` answer from the cache while the server is away."""

    def resolve(self, ref: AdapterRef | str, key: str | None = None) -> Version:
        """See `Hub.resolve`; while the server is away what it was when last asked, with its age in the log."""
        wanted = parsed(ref)
        try:
            return self._resolve_now(wanted, key)
        except ServerAway as error:
            return self._recalled(name_in_cache(wanted, key), error, moves=isinstance(wanted.selector, Alias))

    def get(self, digest: Digest | str) -> Version:
        """See `Hub.get`; while the server is away from the cache."""
        wanted = Digest.parse(digest)
        try:
            answer = self._call("GetVersion", pb.GetVersionRequest(digest=wanted))
        except ServerAway as error:
            return self._recalled(wanted, error, moves=False)
        except NotFound:
            self._cache.forget(wanted)
            raise
        version = self._version(answer.version)
        if version.digest != wanted:
            raise BlobCorrupt(f"the server answered {version.digest} when asked for {wanted}")
        self._cache.remember(wanted, version, answer.last_seq)
        return version

    def versions(self, pattern: str | None = None) -> list[Version]:
        """See `Hub.versions`; those that the caller may read."""
        parts = self._connection.stream("ListVersions", pb.ListVersionsRequest(pattern=pattern), self._actor)
        return [self._version(found.version) for part in parts for found in part.versions]

    def search(self, query: Query) -> Page:
        """See `Hub.search`; among what the caller may read, in as many calls as it takes."""
        versions: list[Version] = []
        aliases: dict[Digest, tuple[str, ...]] = {}
        while True:
            page = self._page(replace(query, limit=min(query.limit - len(versions), messages.MAX_PAGE)))
            versions += page.versions
            aliases |= page.aliases
            if not page.versions or not page.more or len(versions) >= query.limit:
                return Page(tuple(versions), aliases, page.more)
            query = replace(query, after=(versions[-1].full_name, versions[-1].number))

    def _page(self, query: Query) -> Page:
        versions: list[Version] = []
        aliases: dict[Digest, tuple[str, ...]] = {}
        more = False
        for part in self._connection.stream("Search", messages.query_message(query), self._actor):
            for found in part.versions:
                version = self._version(found.version)
                versions.append(version)
                aliases[version.digest] = tuple(found.aliases)
            more = part.more
        return Page(tuple(versions), aliases, more)

    def lineage(self, ref: AdapterRef | str) -> Lineage:
        """See `Hub.lineage`; relatives that the caller may not read are digests alone, or left out."""
        version, complete = None, True
        ancestors: list[Ancestor] = []
        children: list[Version] = []
        for part in self._connection.stream("Lineage", pb.LineageRequest(ref=str(parsed(ref))), self._actor):
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
