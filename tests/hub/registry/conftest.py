from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hub.hub import Hub
from hub.registry.grants import Grant
from hub.registry.server import RegistryConfig, RegistryServer
from hub.registry.tokens import TokenStore
from hub.remote.address import Address
from hub.remote.cache import Cache
from hub.remote.connection import Connection
from hub.remote.remote_hub import RemoteHub


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees this user's hub, cache or credentials."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("LORAPLEX_HUB", str(tmp_path / "default-hub"))
    monkeypatch.delenv("LORAPLEX_HUB_TOKEN", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Hub]:
    """The hub behind the server."""
    with Hub.open(str(tmp_path / "hub")) as opened:
        yield opened


@pytest.fixture
def tokens(store: Hub) -> TokenStore:
    return TokenStore(store.database)


@pytest.fixture
def server(store: Hub, tokens: TokenStore, tmp_path: Path) -> Iterator[RegistryServer]:
    """A server that asks for tokens."""
    config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
    with RegistryServer(store, tokens, config) as running:
        yield running


ConnectAs = Callable[..., RemoteHub]


@pytest.fixture
def connect(server: RegistryServer, tokens: TokenStore, tmp_path: Path) -> Iterator[ConnectAs]:
    """A client for whom a token with these grants was made; each with a cache of its own."""
    with ExitStack() as opened:
        made = 0

        def connect(*grants: str, subject: str = "ada", token: str | None = None) -> RemoteHub:
            nonlocal made
            made += 1
            if token is None and grants:
                token = tokens.create(subject, [Grant.parse(grant) for grant in grants])[1]
            connection = Connection(Address.parse(f"grpc://{server.address}"), token, patience_seconds=5)
            return opened.enter_context(RemoteHub(connection, Cache(tmp_path / f"client-{made}")))

        yield connect
