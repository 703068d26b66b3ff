"""Transactions of the catalog's database, on connections that may have died since they were last used.

No connection is tried before it is used: that would be a round trip for each question. Where one turns out dead (the
database was restarted), the pool drops all of its age, and what was asked is asked once more. A write is begun once
more, which is before it did anything; one that is cut later fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, TypeVar

import sqlalchemy as sa

WRITING: Final = "loraplex_writing"  # execution option: this transaction will write
T = TypeVar("T")
Question = Callable[[sa.Connection], T]  # may be asked twice


def asked(engine: sa.Engine, question: Question[T]) -> T:
    """The answer to a question of one statement, which sees one moment without a transaction around it.

    In PostgreSQL that is one round trip.
    """

    def ask() -> T:
        if engine.dialect.name != "postgresql":  # without round trips there is nothing to gain
            with engine.begin() as connection:
                return question(connection)
        with engine.connect() as connection:
            return question(connection.execution_options(isolation_level="AUTOCOMMIT"))

    return _again(ask)


def read(engine: sa.Engine, question: Question[T]) -> T:
    """The answer to a question of several statements, which all see one moment."""

    def ask() -> T:
        with engine.begin() as connection:
            return question(connection)

    return _again(ask)


@contextmanager
def writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that may write; writers take turns (see `hub.sqlite`, `hub.postgres`)."""

    def begin() -> tuple[sa.Connection, sa.RootTransaction]:
        connection = engine.connect().execution_options(**{WRITING: True})
        try:
            return connection, connection.begin()
        except BaseException:
            connection.close()
            raise

    connection, transaction = _again(begin)
    with connection, transaction:
        yield connection


def _again(work: Callable[[], T]) -> T:
    """What `work` returns; once more where its connection was dead."""
    try:
        return work()
    except sa.exc.DBAPIError as error:
        if not error.connection_invalidated:
            raise
    return work()
