from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from hub.hub import Hub
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
def hub(make_url: MakeUrl) -> Iterator[Hub]:
    """A new hub, over one engine after the other."""
    with Hub.open(make_url()) as opened:
        yield opened
