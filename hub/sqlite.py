"""SQLite as the catalog's database: durable, one writer at a time, readers never blocked."""

from __future__ import annotations

import errno
import os
import sqlite3
import uuid
from contextlib import closing
from pathlib import Path
from typing import Final
from urllib.parse import quote

import sqlalchemy as sa

from hub import schema
from hub.blobs.local import sync_directory
from hub.errors import HubUnavailable
from hub.transactions import WRITING, writing

BUSY_SECONDS: Final = 30.0
MAX_CONNECTIONS: Final = 15  # of one process; further threads wait for one


def open_engine(path: Path) -> sa.Engine:
    """An engine on the database file `path`, made with today's tables where there is none; not yet migrated."""
    if not path.exists():
        _create(path)
    return _engine(path)


def open_for_reading(path: Path) -> sa.Engine:
    """An engine on `path` in a directory that cannot be written; raises HubUnavailable where that cannot work.

    Every transaction is a connection of its own, so that what others write is seen.
    """

    def connect() -> sqlite3.Connection:
        return _connect_read_only(path)

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.pool.NullPool)
    _begin_ourselves(engine)
    with engine.connect() as connection:
        if schema.revision(connection) == schema.HEAD:
            return engine
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        return _migrated_copy(driver)


def copy(path: Path, target: Path) -> None:
    """Write what the database `path` holds now, also of its log, into the new file `target`; raises HubUnavailable."""
    try:
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as made:
            source.backup(made)
    except sqlite3.Error as error:
        target.unlink(missing_ok=True)
        raise HubUnavailable(f"the old catalog cannot be kept aside, so nothing was changed: {cause(error)}") from error


def cause(error: Exception) -> str:
    """A driver's own words, which name no path, except when it cannot open the file; one line.

    `UnicodeDecodeError`: sqlite3 quotes a damaged catalog, and fails over bytes that are no text.
    """
    if isinstance(error, UnicodeDecodeError):
        return "it holds text that is none"
    said = error if isinstance(error, sqlite3.Error) else getattr(error, "orig", None)
    if getattr(said, "sqlite_errorname", "").startswith("SQLITE_IOERR"):  # of a full disk, too
        return f"{said}: its disk is full or failing"
    return str(said or type(error).__name__).partition("\n")[0]


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
        # Opening one takes longer than most of what it is asked: none is closed as long as the engine lives.
        pool_size=MAX_CONNECTIONS,
        max_overflow=0,
    )

    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, record: object) -> None:
        # FULL: a commit that was acknowledged survives a power cut.
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    _begin_ourselves(engine)
    return engine


def _begin_ourselves(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # this module begins transactions, not the driver

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A deferred transaction that reads first and then writes fails at once when another wrote in between, whatever
        # the timeout; one that will write therefore takes the lock at its beginning.
        will_write = connection.get_execution_options().get(WRITING, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if will_write else "BEGIN")


def _create(path: Path) -> None:
    """Make the database whole under another name, then link it into place: several processes may do this at once."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.new")
    try:
        with closing(sqlite3.connect(temporary)) as driver:
            driver.execute("PRAGMA journal_mode=WAL")
        engine = _engine(temporary)
        with writing(engine) as connection:
            schema.bring_up(connection)
        engine.dispose()
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass  # somebody else was first
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            # No hard links on this file system. Whoever opens the file fills it, under SQLite's own lock.
            with closing(sqlite3.connect(path)) as driver:
                driver.execute("PRAGMA journal_mode=WAL")
        sync_directory(path.parent)
    except (OSError, sqlite3.Error, sa.exc.DBAPIError) as error:
        what = os.strerror(error.errno or 0) if isinstance(error, OSError) else cause(error)
        raise HubUnavailable(f"the hub cannot be created: {what}") from error
    finally:
        for suffix in ("", "-wal", "-shm"):
            temporary.with_name(temporary.name + suffix).unlink(missing_ok=True)


def _connect_read_only(path: Path) -> sqlite3.Connection:
    """Read beside a living writer where its shared memory can be read, else the file alone where that is all of it."""
    address = f"file:{quote(str(path))}?mode=ro"
    connection = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)
    try:
        connection.execute("SELECT 1 FROM sqlite_master").fetchone()
        return connection
    except sqlite3.OperationalError:
        connection.close()
        wal = path.with_name(path.name + "-wal")
        if wal.exists() and wal.stat().st_size:
            raise  # part of the catalog is in the log, and only somebody who may write can read that
    # Nobody has it open and the file is whole: "immutable" lets SQLite do without shared memory.
    return sqlite3.connect(f"{address}&immutable=1", uri=True, check_same_thread=False)


def _migrated_copy(source: sqlite3.Connection) -> sa.Engine:
    """A copy in memory of an older release's catalog, migrated; what is written later is not seen."""
    engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
    _begin_ourselves(engine)
    raw = engine.raw_connection()
    try:
        driver = raw.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        source.backup(driver)
    finally:
        raw.close()
    with engine.begin() as connection:
        schema.bring_up(connection)
    return engine
