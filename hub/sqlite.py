"""SQLite as the catalog's database: durable, one writer at a time, readers never blocked."""

from __future__ import annotations

import os
import sqlite3
import uuid
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from hub.errors import HubUnavailable

BUSY_SECONDS: Final = 30.0
WRITING: Final = "loraplex_writing"  # execution option: this transaction will write


def open_engine(path: Path, metadata: sa.MetaData) -> sa.Engine:
    """An engine on the database file `path`, made with the tables of `metadata` where there is none."""
    if not path.exists():
        _create(path, metadata)
    return _engine(path)


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)), connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False}
    )

    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, record: Any) -> None:
        connection.isolation_level = None  # this module begins transactions, not the driver
        # FULL: a commit that was acknowledged survives a power cut.
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A deferred transaction that reads first and then writes fails at once when another wrote in between, whatever
        # the timeout; one that will write therefore takes the lock at its beginning.
        writing = connection.get_execution_options().get(WRITING, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _create(path: Path, metadata: sa.MetaData) -> None:
    """Make the database whole under another name, then link it into place: several processes may do this at once."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    try:
        with closing(sqlite3.connect(temporary)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        engine = _engine(temporary)
        with engine.execution_options(**{WRITING: True}).begin() as transaction:
            metadata.create_all(transaction)
        engine.dispose()
        with suppress(FileExistsError):  # somebody else may be first
            os.link(temporary, path)
    except (OSError, sqlite3.Error, sa.exc.DBAPIError) as error:
        what = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "the database cannot be made"
        raise HubUnavailable(f"the hub cannot be created: {what}") from error
    finally:
        for suffix in ("", "-wal", "-shm"):
            temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)
