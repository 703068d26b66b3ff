"""The calls that administer tokens, and tokens as messages."""

# ruff: noqa: N802  # methods are called as the calls of the proto

from __future__ import annotations

from collections.abc import Iterable

from hub.errors import Forbidden
from hub.registry.access import Access, Context
from hub.registry.grants import Caller, Grant
from hub.registry.tokens import Token, TokenStore
from protos.loraplex.v1 import registry_pb2 as pb


class TokenCalls(Access):
    """CreateToken, ListTokens, RevokeToken."""

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

    def _token_store(self, caller: Caller) -> TokenStore:
        if self._tokens is None:
            raise Forbidden("this server runs without tokens")
        caller.require_everywhere("admin")
        return self._tokens


def grant_messages(grants: Iterable[Grant]) -> list[pb.Grant]:
    """Grants, as messages."""
    return [pb.Grant(namespace=grant.namespace, roles=grant.roles) for grant in grants]


def _token_message(token: Token) -> pb.TokenInfo:
    return pb.TokenInfo(
        id=token.id, subject=token.subject, grants=grant_messages(token.grants), created=token.created,
        created_by=token.created_by, expires=token.expires, revoked=token.revoked, revoked_by=token.revoked_by,
    )  # fmt: skip
