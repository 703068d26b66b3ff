"""Tokens administered over the wire, by an admin of all namespaces."""

from __future__ import annotations

from collections.abc import Sequence

from hub.registry.grants import Grant
from hub.registry.tokens import Token
from hub.remote.remote_hub import RemoteHub
from protos.loraplex.v1 import registry_pb2 as pb


class RemoteTokens:
    """The tokens of a shared hub; closed by `with`. Raises Forbidden, GrantInvalid, TokenNotFound."""

    def __init__(self, hub: RemoteHub) -> None:
        self._hub = hub

    def __enter__(self) -> RemoteTokens:
        return self

    def __exit__(self, *error: object) -> None:
        self._hub.close()

    def create(self, subject: str, grants: Sequence[Grant], lifetime_seconds: float | None) -> tuple[Token, str]:
        """A new token, and its text, which nobody keeps."""
        wanted = [pb.Grant(namespace=grant.namespace, roles=grant.roles) for grant in grants]
        request = pb.CreateTokenRequest(subject=subject, grants=wanted, lifetime_seconds=lifetime_seconds)
        answer = self._hub.connection.call("CreateToken", request)
        return _token(answer.token), answer.secret

    def list(self) -> list[Token]:
        """All tokens, oldest first."""
        return [_token(each) for each in self._hub.connection.call("ListTokens", pb.ListTokensRequest()).tokens]

    def revoke(self, identifier: str) -> Token:
        """Refuse this token from now on."""
        return _token(self._hub.connection.call("RevokeToken", pb.RevokeTokenRequest(id=identifier)).token)


def _token(message: pb.TokenInfo) -> Token:
    return Token(
        message.id,
        message.subject,
        tuple(Grant.of(grant.namespace, grant.roles) for grant in message.grants),
        message.created,
        message.created_by if message.HasField("created_by") else None,
        message.expires if message.HasField("expires") else None,
        message.revoked if message.HasField("revoked") else None,
        message.revoked_by if message.HasField("revoked_by") else None,
    )
