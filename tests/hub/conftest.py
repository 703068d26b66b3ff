from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from hub.facade import HubFacade
from hub.hub import Hub
from hub.registry.server import RegistryConfig, RegistryServer
from hub.remote.remote_hub import RemoteHub
from tests.hub import postgres


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees this user's hub or fingerprint cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LORAPLEX_HUB", str(tmp_path / "default-hub"))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A running PostgreSQL's URL."""
    found = postgres.binaries()
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with postgres.server(found) as url:
        yield url


@pytest.fixture
def postgres_database(postgres_server: str) -> Iterator[str]:
    """A new database's URL, without `?blobs=`."""
    name = f"hub_{uuid.uuid4().hex}"
    engine = sa.create_engine(
        sa.make_url(postgres_server).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT"
    )
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    yield postgres_server.rpartition("/")[0] + f"/{name}"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()


MakeUrl = Callable[[], str]


@pytest.fixture(params=["sqlite", "postgresql"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """A function that returns the URL of this test's hub, over one engine after the other."""
    if request.param == "sqlite":
        return lambda: str(tmp_path / "hub")
    database: str = request.getfixturevalue("postgres_database")
    return lambda: f"{database}?blobs={tmp_path / 'hub'}"


@pytest.fixture
def local_hub(make_url: MakeUrl) -> Iterator[Hub]:
    """A new hub on this machine, over one engine after the other; for tests that reach behind the facade."""
    with Hub.open(make_url()) as opened:
        yield opened


@pytest.fixture(params=["local", "remote"])
def hub(request: pytest.FixtureRequest, local_hub: Hub, tmp_path: Path) -> Iterator[HubFacade]:
    """A new hub, over one engine after the other, here and behind a server."""
    if request.param == "local":
        yield local_hub
        return
    config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "registry-uploads")
    with RegistryServer(local_hub, None, config) as server, RemoteHub.open(f"grpc://{server.address}") as opened:
        yield opened
