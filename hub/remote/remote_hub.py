"""The facade over gRPC: the same contract as `hub.hub.Hub`, on a server's word and verified here byte by byte."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from hub.remote import credentials
from hub.remote.address import Address
from hub.remote.cache import Cache
from hub.remote.changes import RemoteChanges
from hub.remote.connection import Connection
from hub.remote.content import RemoteContent
from hub.remote.following import RemoteFollowing
from hub.remote.remote_adopting import RemoteAdopting
from hub.remote.remote_evaluations import RemoteEvaluations
from hub.remote.remote_signatures import RemoteSignatures

if TYPE_CHECKING:
    from hub.facade import HubFacade


class RemoteHub(RemoteSignatures, RemoteEvaluations, RemoteAdopting, RemoteContent, RemoteChanges, RemoteFollowing):
    """A shared hub, opened; methods are safe to call from several threads and raise what `hub.hub.Hub`'s do.

    Beside those: Unauthenticated, Forbidden, ServerBusy. While the server is away `resolve`, `get`, `read_file`,
    `pull` and `last_seq` answer from the cache what they answered before, with a warning in the log that says how old
    it is; everything else raises HubUnavailable.
    """

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

    @property
    def connection(self) -> Connection:
        """For the verbs that only a shared hub has."""
        return self._connection


def _keeps_the_contract(hub: RemoteHub) -> HubFacade:
    """Checked by mypy, never called."""
    return hub
