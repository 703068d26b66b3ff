"""A real PostgreSQL for the tests, started from Debian's package in a temporary directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from tests.ports import free_port


def binaries() -> Path | None:
    """Where initdb and postgres lie; None where the package is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).parent if on_path else None


@contextmanager
def server(bin_directory: Path) -> Iterator[str]:
    """A server on a port of its own; the URL of its empty database, without `?blobs=`."""
    # Not under pytest's directory: that is closed to the user whom PostgreSQL, which refuses root, runs as.
    root = Path(tempfile.mkdtemp(prefix="loraplex-pg-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(root, "postgres", "postgres")
        port = free_port()
        data = root / "data"
        # Not C: names must sort by code point whatever the server's language.
        initdb = [str(bin_directory / "initdb"), "-D", str(data), "-U", "hub", "-A", "trust", "-E", "UTF8", "-N"]
        _run([*_as_user(), *initdb])
        with (data / "postgresql.conf").open("a") as settings:
            settings.write(f"port = {port}\nunix_socket_directories = '{root}'\nlisten_addresses = '127.0.0.1'\n")
            settings.write("shared_buffers = 16MB\nmax_connections = 60\nfsync = off\n")
        _control(bin_directory, data, "start")
        try:
            yield f"postgresql://hub@127.0.0.1:{port}/postgres"
        finally:
            _control(bin_directory, data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def stopped(bin_directory: Path, url: str) -> Iterator[None]:
    """The server of `url` is stopped, and started again."""
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"))
    with engine.connect() as connection:
        data = Path(connection.exec_driver_sql("SHOW data_directory").scalar_one())
    engine.dispose()
    _control(bin_directory, data, "-m", "fast", "stop")
    try:
        yield
    finally:
        _control(bin_directory, data, "start")


def _as_user() -> list[str]:
    root = os.geteuid() == 0
    return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"] if root else []


def _control(bin_directory: Path, data: Path, *words: str) -> None:
    program = [str(bin_directory / "pg_ctl"), "-D", str(data), "-w", "-t", "40", "-l", str(data.parent / "log")]
    _run([*_as_user(), *program, *words])


def _run(command: Sequence[str]) -> None:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    # pg_ctl's child keeps its output open, so that goes to /dev/null and not to a pipe.
    subprocess.run(
        command, check=True, timeout=60, cwd="/", env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
