"""What all parts of the remote facade share: calls, answers as nouns, and names that the cache recalls."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, Final

from hub.actor import current_user
from hub.errors import BlobCorrupt, HubUnavailable, NotFound
from hub.refs import AdapterRef, Alias, Digest
from hub.remote import messages
from hub.remote.cache import Cache, Known
from hub.remote.connection import Connection, ServerAway
from hub.versions import Version
from protos.loraplex.v1 import registry_pb2 as pb

log = logging.getLogger(__name__)
MAX_STALE_SECONDS: Final = 7 * 24 * 3600.0  # an alias older than this is not used while the server is away


class RemoteCalls:
    """One caller of one server, with its cache."""

    def __init__(self, connection: Connection, cache: Cache, *, actor: str | None = None) -> None:
        self._connection = connection
        self._cache = cache
        # Without a token nobody else says who writes.
        self._actor = actor or (None if connection.has_token else current_user())

    def _call(self, method: str, request: Any) -> Any:
        return self._connection.call(method, request, self._actor)

    def _version(self, message: pb.AdapterVersion) -> Version:
        return messages.version_of(message)

    def _resolve_now(self, ref: AdapterRef, key: str | None = None) -> Version:
        try:
            answer = self._call("Resolve", pb.ResolveRequest(ref=str(ref), key=key))
        except NotFound:
            self._cache.forget(name_in_cache(ref, key))
            raise
        version = self._version(answer.version)
        if version.full_name != ref.full_name or not _fits(ref, version):
            raise BlobCorrupt(f"the server answered {version.text} when asked for {ref}")
        self._cache.remember(name_in_cache(ref, key), version, answer.last_seq)
        self._cache.remember(version.digest, version, answer.last_seq)
        return version

    def _recalled(self, name: str, error: ServerAway, *, moves: bool) -> Version:
        found = self._cache.recall(name)
        if found is None:
            raise HubUnavailable(f"{error.public}; {name} is not in the cache", error.detail) from error
        version, known = found
        if moves and known.age_seconds > MAX_STALE_SECONDS:
            raise HubUnavailable(
                f"{error.public}; {name} was {version.text} {_age(known)} ago, which is too long to go by: "
                f"name {version.text}",
                error.detail,
            ) from error
        log.warning("the hub's server is away; %s is %s, as of %s ago", name, version.text, _age(known))
        return version


def parsed(ref: AdapterRef | str) -> AdapterRef:
    """A reference, parsed if it is text; raises RefInvalid."""
    return AdapterRef.parse(ref) if isinstance(ref, str) else ref


def exact(version: Version) -> AdapterRef:
    """The reference that always means this version."""
    return replace(AdapterRef.parse(version.full_name), selector=version.digest)


def _fits(ref: AdapterRef, version: Version) -> bool:
    """Whether a version can be what an immutable reference names."""
    if isinstance(ref.selector, Alias):
        return True
    return ref.selector == version.digest if isinstance(ref.selector, Digest) else ref.selector.number == version.number


def name_in_cache(ref: AdapterRef, key: str | None) -> str:
    """Under which name the cache keeps what `ref` means for callers with this key."""
    return str(ref) if key is None else f"{ref} for {key}"


def _age(known: Known) -> str:
    seconds = known.age_seconds
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
