"""Tokens administered where the hub lies: whoever may write its database may make the first one."""

from __future__ import annotations

from collections.abc import Sequence

from hub.actor import current_user
from hub.hub import Hub
from hub.registry.grants import Grant
from hub.registry.tokens import Token, TokenStore


class LocalTokens:
    """The tokens of a hub opened here, which `with` closes."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._store = TokenStore(hub.database)

    def __enter__(self) -> LocalTokens:
        return self

    def __exit__(self, *error: object) -> None:
        self._hub.close()

    def create(self, subject: str, grants: Sequence[Grant], lifetime_seconds: float | None) -> tuple[Token, str]:
        """See `TokenStore.create`."""
        return self._store.create(subject, grants, lifetime_seconds, current_user())

    def list(self) -> list[Token]:
        """See `TokenStore.list`."""
        return self._store.list()

    def revoke(self, identifier: str) -> Token:
        """See `TokenStore.revoke`."""
        return self._store.revoke(identifier, current_user())
