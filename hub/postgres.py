"""PostgreSQL as the catalog's database, through psycopg 3."""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from hub.errors import HubUnavailable
from hub.sqlite import MAX_CONNECTIONS
from hub.transactions import WRITING

CONNECT_SECONDS: Final = 10
BUSY_SECONDS: Final = 30
# One writer at a time, as in SQLite: event numbers have no gaps, and readers see them in order.
_WRITER_LOCK: Final = 0x6C6F7261706C6578  # "loraplex"


def open_engine(url: sa.URL) -> sa.Engine:
    """An engine on the database `url` names; raises HubUnavailable where the driver is missing.

    Nothing is connected yet. A connection that died in the pool fails: see `hub.transactions`.
    """
    asked = url.query.get("options", "")  # such as "-c search_path=loraplex"
    # Transactions read what was committed when they began; said once here, it is no round trip for each of them.
    reading = "-c default_transaction_isolation=repeatable\\ read -c default_transaction_read_only=on"
    options = f"-c lock_timeout={BUSY_SECONDS}s {reading} {asked if isinstance(asked, str) else ' '.join(asked)}"
    try:
        engine = sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            pool_size=MAX_CONNECTIONS,
            max_overflow=0,
            connect_args={"connect_timeout": CONNECT_SECONDS, "options": options},
        )
    except ImportError as error:
        raise HubUnavailable("a PostgreSQL catalog needs psycopg: pip install 'psycopg[binary]'") from error

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        if connection.get_execution_options().get(WRITING, False):
            # Every statement after the lock sees what the writer before committed (READ COMMITTED).
            connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")

    return engine
