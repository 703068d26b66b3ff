"""Signatures of a shared hub's versions, and what the cache keeps of them."""

from __future__ import annotations

import base64
import json
import uuid
from contextlib import suppress

from hub.errors import NotCached
from hub.refs import Digest
from hub.remote.cache import Cache
from hub.remote.connection import Connection, ServerAway
from protos.loraplex.v1 import registry_pb2 as pb


class RemoteSignatures:
    """The part of `hub.remote.remote_hub.RemoteHub` that is about signatures."""

    _connection: Connection
    _cache: Cache
    _actor: str | None

    def add_signature(self, digest: Digest | str, signature: bytes) -> bool:
        """See `Hub.add_signature`."""
        request = pb.SignRequest(digest=Digest.parse(digest), signature=signature)
        return bool(self._connection.call("Sign", request, self._actor).added)

    def signatures(self, digest: Digest | str) -> tuple[bytes, ...]:
        """See `Hub.signatures`; while the server is away those that it gave before."""
        wanted = Digest.parse(digest)
        try:
            answer = self._connection.call("Signatures", pb.SignaturesRequest(digest=wanted), self._actor)
        except ServerAway as error:
            known = recall(self._cache, wanted)
            if known is None:
                raise NotCached(
                    f"{error.public}; the signatures of {wanted} are not in the cache", error.detail
                ) from error
            return known
        found = tuple(answer.signatures)
        remember(self._cache, wanted, found)
        return found


def remember(cache: Cache, digest: Digest, signatures: tuple[bytes, ...]) -> None:
    """Keep a version's signatures; whoever uses them checks them with a key, so that a damaged copy cannot lie."""
    path = cache.signatures / digest.hex
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with suppress(OSError):  # a cache that cannot be written is slower, not wrong
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_text(json.dumps([base64.b64encode(each).decode() for each in signatures]))
        temporary.replace(path)


def recall(cache: Cache, digest: Digest) -> tuple[bytes, ...] | None:
    """The signatures of a version as the server gave them last; None where it was not asked."""
    try:
        return tuple(base64.b64decode(each) for each in json.loads((cache.signatures / digest.hex).read_text()))
    except (OSError, ValueError, TypeError):
        return None
