"""A real PostgreSQL for the tests, started from Debian's package in a temporary directory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


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
        as_user: list[str] = []
        if os.geteuid() == 0:
            as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--"]
            shutil.chown(root, "postgres", "postgres")
        port = _free_port()
        data = root / "data"
        _run([*as_user, str(bin_directory / "initdb"), "-D", str(data), "-U", "hub", "-A", "trust", "-E", "UTF8", "-N"])
        # Not C: names must sort by code point whatever the server's language.
        settings = f"-p {port} -k {root} -h 127.0.0.1 -c shared_buffers=16MB -c max_connections=60 -c fsync=off"
        control = [*as_user, str(bin_directory / "pg_ctl"), "-D", str(data), "-w", "-t", "40"]
        _run([*control, "-o", settings, "-l", str(root / "log"), "start"])
        try:
            yield f"postgresql://hub@127.0.0.1:{port}/postgres"
        finally:
            _run([*control, "-m", "immediate", "stop"])
    finally:
        shutil.rmtree(root, ignore_errors=True)


def _run(command: Sequence[str]) -> None:
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    # pg_ctl's child keeps its output open, so that goes to /dev/null and not to a pipe.
    subprocess.run(
        command, check=True, timeout=60, cwd="/", env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
