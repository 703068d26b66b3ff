"""Whether the catalog fits together: its tables with its events, and with the manifests they were filled from.

SQLite keeps no checksums, so a damaged row is found by what else tells the same. All is read inside one transaction of
the catalog's: beside writers it sees one moment.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import sqlalchemy as sa

from hub import catalog_rows, catalog_signatures, tables
from hub.catalog_signatures import PREFIX as SIGNATURE
from hub.catalog_writer import Derived
from hub.errors import HubUnavailable
from hub.refs import Digest
from hub.replay import Key, State, replay


def check(connection: sa.Connection) -> list[str]:
    """What is wrong, in words; empty where nothing is."""
    wrong = _rows(connection)
    try:
        wrong += _differences(_state(connection), replay(catalog_rows.select_events(connection)))
        wrong += _derived(connection)
    except HubUnavailable as error:  # a row that cannot be read at all
        wrong.append(str(error))
    return wrong


def _rows(connection: sa.Connection) -> list[str]:
    """Where rows miss others, and what the database says of itself."""
    wrong = []
    e, a, t, v = tables.events, tables.aliases, tables.targets, tables.versions
    newest = catalog_rows.last_seq(connection)
    count = connection.execute(sa.select(sa.func.count()).select_from(e)).scalar_one()
    if count != newest:
        wrong.append(f"the journal has {count} events, but the newest is number {newest}")
    dangling = (
        sa.select(t)
        .outerjoin(v, (v.c.full_name == t.c.full_name) & (v.c.number == t.c.number))
        .where(sa.or_(v.c.number.is_(None), v.c.removed.is_not(None)))
    )
    wrong += [
        f"{row.full_name}:{row.alias} holds version {row.number}, which is not there"
        for row in connection.execute(dangling)
    ]
    empty = sa.select(a).outerjoin(t, (t.c.full_name == a.c.full_name) & (t.c.alias == a.c.alias))
    wrong += [
        f"{row.full_name}:{row.alias} holds nothing" for row in connection.execute(empty.where(t.c.number.is_(None)))
    ]
    if connection.dialect.name == "sqlite":
        verdicts = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
        wrong += [f"SQLite says: {verdict}" for verdict in verdicts if verdict != "ok"]
    return wrong


def _derived(connection: sa.Connection) -> Iterator[str]:
    """Versions of which the tables hold something else than their manifests say; a damaged manifest says nothing."""
    f, m, v = tables.files.c, tables.metrics.c, tables.versions.c
    files = _by_version(
        connection, sa.select(f.full_name, f.number, f.name, f.sha256).where(~f.name.startswith(SIGNATURE))
    )
    metrics = _by_version(connection, sa.select(m.full_name, m.number, m.name, m.value))
    for row in connection.execute(sa.select(tables.versions).order_by(v.full_name, v.number)):
        record = catalog_rows.record_of(row)
        if hashlib.sha256(record.manifest).hexdigest() != record.digest.hex:
            continue
        key = record.full_name, record.number
        found = Derived(
            row.content, row.base_name, row.base_fingerprint, dict(files.get(key, ())), dict(metrics.get(key, ()))
        )
        told = Derived.of(record.manifest)
        if found != told:
            what = [each.name for each in fields(Derived) if getattr(found, each.name) != getattr(told, each.name)]
            yield f"{record.text}: the tables differ from its manifest in {', '.join(what)}"


def _by_version(connection: sa.Connection, query: sa.Select[Any]) -> dict[Key, list[tuple[str, Any]]]:
    """The rows' last two columns, a name and a value, by the version that the first two name."""
    found: dict[Key, list[tuple[str, Any]]] = {}
    for full_name, number, name, value in connection.execute(query):
        found.setdefault((full_name, number), []).append((name, value))
    return found


def _state(connection: sa.Connection) -> State:
    """What the tables hold, in the words of a replay."""
    v, a, t = tables.versions, tables.aliases, tables.targets
    found = State(last_seq=catalog_rows.last_seq(connection))
    for row in connection.execute(sa.select(v.c.full_name, v.c.number, v.c.digest, v.c.removed)):
        found.versions[row.full_name, row.number] = Digest(row.digest)
        if row.removed is not None:
            found.removed[row.full_name, row.number] = row.removed
    for row in connection.execute(sa.select(tables.purged)):
        found.purged[row.full_name, row.number] = (Digest(row.digest), row.time)
    held: dict[tuple[str, str, int], list[tuple[int, int]]] = {}
    joined = sa.select(a, t.c.number, t.c.weight).join(t, (t.c.full_name == a.c.full_name) & (t.c.alias == a.c.alias))
    for row in connection.execute(joined.order_by(t.c.number)):
        held.setdefault((row.full_name, row.alias, row.generation), []).append((row.number, row.weight))
    found.aliases = {(name, alias): (tuple(items), seq) for (name, alias, seq), items in held.items()}
    for row in connection.execute(sa.select(tables.leases).where(tables.leases.c.expires.is_(None))):
        found.pins.add((row.full_name, row.number, row.holder))
    found.signatures = set(catalog_signatures.everywhere(connection))
    for row in connection.execute(sa.select(tables.adapters)):
        found.next_number[row.full_name] = row.next_number
    return found


def _differences(tables: State, told: State) -> Iterator[str]:
    """Where the tables are not what the events lead to."""
    for what in ("versions", "removed", "purged", "aliases", "next_number"):
        mine, theirs = getattr(tables, what), getattr(told, what)
        for key in sorted(mine.keys() | theirs.keys(), key=repr):  # damaged keys may be of any type
            if mine.get(key) != theirs.get(key):
                name = f"{key[0]}{'@' if isinstance(key[1], int) else ':'}{key[1]}" if isinstance(key, tuple) else key
                yield f"{name}: the tables have {mine.get(key)} among {what}, the events say {theirs.get(key)}"
    for name, number, holder in sorted(tables.pins ^ told.pins, key=repr):
        yield f"{name}@{number}: the tables and the events differ on the pin of {holder}"
    for name, number, signature in sorted(tables.signatures ^ told.signatures, key=repr):
        yield f"{name}@{number}: the tables and the events differ on the signature {signature.hex[:16]}"
