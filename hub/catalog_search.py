"""Queries over many versions, inside a transaction of the catalog's."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import sqlalchemy as sa

from hub import catalog_rows, tables
from hub.catalog_rows import Record
from hub.refs import Digest
from hub.search import COMPARE, MetricTest, Query

_BATCH: Final = 1001  # a page of the shared server's, and whether there is more
_FEW: Final = 1000
_WILD: Final = frozenset("*?[")


Page = tuple[list[Record], dict[Digest, tuple[str, ...]], bool]  # versions, their aliases, whether there are more
_HELD_BY = (
    sa.select(sa.func.aggregate_strings(tables.targets.c.alias, ","))
    .where(*(tables.targets.c[key] == tables.versions.c[key] for key in ("full_name", "number")))
    .correlate(tables.versions)
    .scalar_subquery()
    .label("held_by")
)


def search(connection: sa.Connection, query: Query, *, at_once: bool = False) -> Page | None:
    """Versions that are there and meet the query, by name and number; their aliases; whether there are more.

    With `at_once` one statement tells all of it (others only say how to put it), or the answer is None.
    """
    found: list[Record] = []
    held: dict[Digest, tuple[str, ...]] = {}
    after = query.after
    few = [test for test in query.metrics if _met_by_few(connection, test)]
    while True:
        batch = min(_BATCH, max(50, query.limit + 1 - len(found)))
        rows = connection.execute(_statement(query, after, few).limit(batch)).all()
        for row in rows:
            if query.pattern is not None and not fnmatch.fnmatchcase(row.full_name, query.pattern):
                continue
            if len(found) == query.limit:
                return found, held, True
            record = catalog_rows.record_of(row)
            found.append(record)
            held[record.digest] = tuple(sorted(row.held_by.split(","))) if row.held_by else ()
        if len(rows) < batch:
            return found, held, False
        if at_once:
            return None
        after = (rows[-1].full_name, rows[-1].number)


def naming(connection: sa.Connection, digest: Digest) -> list[Record]:
    """The versions whose manifest names this digest among its parents."""
    v = tables.versions
    # Digests of manifests appear in manifests only as parents (or in free text, which the caller's reading sorts out).
    query = sa.select(v).where(v.c.manifest.contains(digest, autoescape=True), v.c.removed.is_(None))
    return [catalog_rows.record_of(row) for row in connection.execute(query.order_by(v.c.full_name, v.c.number))]


def _statement(query: Query, after: tuple[str, int], few: Sequence[MetricTest]) -> sa.Select[Any]:
    v = tables.versions
    statement = sa.select(v, _HELD_BY).where(v.c.removed.is_(None)).order_by(v.c.full_name, v.c.number)
    if after != ("", 0):
        statement = statement.where(sa.tuple_(v.c.full_name, v.c.number) > sa.tuple_(*map(sa.literal, after)))
    if query.newest:
        # The adapters lead: one look-up each, however many versions they have.
        a, other = tables.adapters, tables.versions.alias()
        newest = (
            sa.select(sa.func.max(other.c.number))
            .where(other.c.full_name == a.c.full_name, other.c.removed.is_(None))
            .scalar_subquery()
        )
        statement = statement.join(a, a.c.full_name == v.c.full_name).where(v.c.number == newest)
        if after != ("", 0):
            statement = statement.where(a.c.full_name >= after[0])  # or a later page walks all before it again
    if query.pattern is not None:
        statement = statement.where(*_named(v.c.full_name, query.pattern))
        if query.newest:  # said of both: SQLite begins with the versions, PostgreSQL with the adapters, which are fewer
            statement = statement.where(*_named(tables.adapters.c.full_name, query.pattern))
    if query.base is not None:
        by_name = v.c.base_name == query.base
        by_print = v.c.base_fingerprint.startswith(query.base, autoescape=True)
        statement = statement.where(sa.or_(by_name, by_print) if query.base.startswith("sha256:") else by_name)
    if query.tag is not None:
        t = tables.targets.c
        statement = statement.where(_has(t, t.alias == query.tag))
    for test in query.metrics:
        statement = statement.where(_meets(test, few=test in few))
    return statement


def _named(name: Any, pattern: str) -> Iterator[sa.ColumnElement[bool]]:
    """Conditions that every name the shell pattern matches meets, and few others."""
    if not _like(pattern).isascii():
        yield sa.false()  # names are ASCII; there may be no next character to end a range with
        return
    prefix = pattern[: next((i for i, char in enumerate(pattern) if char in _WILD), None)]
    if prefix == pattern:
        yield name == prefix
        return
    if prefix:
        yield name >= prefix
        yield name < prefix[:-1] + chr(ord(prefix[-1]) + 1)
    yield name.like(_like(pattern), escape="\\")


def _met_by_few(connection: sa.Connection, test: MetricTest) -> bool:
    """Whether so few versions meet it that the search begins with them; counts no further than it has to."""
    m = tables.metrics.c
    some = sa.select(sa.literal(1)).where(*_met(test)).select_from(m.value.table).limit(_FEW + 1).subquery()
    return int(connection.execute(sa.select(sa.func.count()).select_from(some)).scalar_one()) <= _FEW


def _meets(test: MetricTest, *, few: bool) -> sa.ColumnElement[bool]:
    """Few are looked up first; where many meet it, versions are walked in order and each is asked."""
    m, v = tables.metrics.c, tables.versions
    if few:
        return sa.tuple_(v.c.full_name, v.c.number).in_(sa.select(m.full_name, m.number).where(*_met(test)))
    return _has(m, *_met(test))


def _met(test: MetricTest) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    m = tables.metrics.c
    return m.name == test.name, COMPARE[test.compare](m.value, sa.literal(test.bound, sa.Double))


def _has(columns: Any, *conditions: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """The version has a row of this table that meets the conditions."""
    v = tables.versions.c
    same = (columns.full_name == v.full_name, columns.number == v.number)
    return sa.exists(sa.literal(1)).where(*same, *conditions).correlate(tables.versions)


def _like(pattern: str) -> str:
    """A LIKE pattern, with backslash for escape, that matches at least what the shell pattern matches."""
    text = re.sub(r"\[!?\]?[^\]]*\]", "?", pattern)  # a class stands for one character
    return "".join({"*": "%", "?": "_"}.get(char, f"\\{char}" if char in "%_\\" else char) for char in text)
