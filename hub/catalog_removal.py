"""Removing versions and what keeps them, inside a transaction of the catalog's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import sqlalchemy as sa

from hub import catalog_rows, tables
from hub.catalog_rows import Record
from hub.catalog_signatures import PREFIX as SIGNATURE
from hub.catalog_writer import Writer, same_version
from hub.errors import HubUnavailable, NotRestorable, RefInvalid, VersionHeld, VersionNotFound
from hub.refs import AdapterRef, Alias, Digest, Version
from hub.versions import Lease

_FORGET_SECONDS: Final = 3600.0


def remove(writer: Writer, record: Record) -> Record:
    """Mark the version as removed; raises VersionHeld, naming what holds it."""
    t = tables.targets
    query = sa.select(t.c.alias).where(*same_version(t, record)).order_by(t.c.alias)
    holders = [f":{alias}" for alias in writer.connection.execute(query).scalars()]
    for held in leases(writer.connection, record.full_name):
        if held.version == record.number:
            holders.append(f"{'a pin' if held.expires is None else 'a lease'} of {held.holder}")
    if holders:
        raise VersionHeld(f"{record.text} is held by {', '.join(holders)}: move or release what holds it first")
    writer.mark_removed(record, writer.time)
    writer.append("rm", record)
    return record


def restore(writer: Writer, ref: AdapterRef) -> Record:
    """Take the mark of the version back; see `Catalog.restore`."""
    name, selector = ref.full_name, ref.selector
    if isinstance(selector, Alias):
        raise RefInvalid(f"{ref}: an alias holds no removed version; name it by number, {name}@3, or by digest")
    column = "number" if isinstance(selector, Version) else "digest"
    value = selector.number if isinstance(selector, Version) else selector
    v, p = tables.versions, tables.purged
    record = catalog_rows.select_record(writer.connection, v.c.full_name == name, v.c[column] == value)
    if record is not None and record.removed is not None:
        return bring_back(writer, record)
    if record is not None:
        raise NotRestorable(f"{record.text} is not removed")
    row = writer.connection.execute(sa.select(p).where(p.c.full_name == name, p.c[column] == value)).first()
    if row is not None:
        raise NotRestorable(f"{name}@{row.number} was swept at {row.time}: its bytes are gone")
    catalog_rows.check_known(writer.connection, name)
    raise VersionNotFound(f"{name} has no version {str(selector).removeprefix('@')}")


def bring_back(writer: Writer, record: Record) -> Record:
    """Take the mark of a removed version back."""
    writer.mark_removed(record, None)
    writer.append("restore", record)
    return replace(record, removed=None)


def expired(connection: sa.Connection, removed_before: str) -> list[Record]:
    """The versions that were marked as removed up to this time; times of one form sort as text."""
    v = tables.versions
    query = sa.select(v).where(v.c.removed <= removed_before).order_by(v.c.full_name, v.c.number)
    return [catalog_rows.record_of(row) for row in connection.execute(query)]


def purge(writer: Writer, records: Sequence[Record]) -> list[Record]:
    """Forget these versions for good, but for those that are not as removed as they were when they were read."""
    gone = []
    for record in records:
        if catalog_rows.numbered(writer.connection, record.full_name, record.number) == record:
            writer.purge(record)
            gone.append(record)
    return gone


def unreferenced(connection: sa.Connection, digests: Sequence[Digest], leaving: Sequence[Record] = ()) -> list[Digest]:
    """Those of `digests` that are neither a manifest nor a file of a version outside `leaving`.

    Raises HubUnavailable where a version's files are not known, as its manifest in the catalog is damaged.
    """
    v, f = tables.versions, tables.files
    own = (f.c.full_name == v.c.full_name) & (f.c.number == v.c.number) & ~f.c.name.startswith(SIGNATURE)
    unknown = sa.select(v).outerjoin(f, own)
    if row := connection.execute(unknown.where(f.c.name.is_(None)).limit(1)).first():
        raise HubUnavailable(
            f"the files of {row.full_name}@{row.number} are not known, so nothing is swept: run `hub fsck --rebuild`"
        )
    outgoing = {(record.full_name, record.number) for record in leaving}
    wanted = set()
    for column in (v.c.digest, f.c.sha256):
        table = column.table
        query = sa.select(column, table.c.full_name, table.c.number).where(column.in_(digests))
        wanted |= {row[0] for row in connection.execute(query) if (row[1], row[2]) not in outgoing}
    return [digest for digest in digests if digest not in wanted]


def lease(writer: Writer, record: Record, holder: str, expires: float | None) -> Lease:
    """Enter or renew a lease; a pin (without end) is also an event."""
    t = tables.leases
    # Those of servers that died are of no more use, and nobody else takes them away.
    writer.connection.execute(sa.delete(t).where(t.c.expires < time.time() - _FORGET_SECONDS))
    found = (*same_version(t, record), t.c.holder == holder)
    row = writer.connection.execute(sa.select(t).where(*found)).first()
    if row is None:
        key = {"full_name": record.full_name, "number": record.number, "holder": holder}
        writer.connection.execute(sa.insert(t).values(**key, expires=expires))
    else:
        writer.connection.execute(sa.update(t).where(*found).values(expires=expires))
    if expires is None and (row is None or row.expires is not None):
        writer.append("pin", record, note=holder)
    elif row is not None and row.expires is None and expires is not None:
        writer.append("unpin", record, note=holder)
    return Lease(record.full_name, record.number, holder, expires)


def release(writer: Writer, record: Record, holder: str) -> None:
    """Take a lease or pin back; nothing happens where there is none."""
    t = tables.leases
    found = (*same_version(t, record), t.c.holder == holder)
    row = writer.connection.execute(sa.select(t).where(*found)).first()
    if row is not None:
        writer.connection.execute(sa.delete(t).where(*found))
        if row.expires is None:
            writer.append("unpin", record, note=holder)


def leases(connection: sa.Connection, full_name: str | None = None) -> list[Lease]:
    """What is held now, of one adapter or of all; leases that ran out are not shown."""
    t = tables.leases
    query = sa.select(t).where(sa.or_(t.c.expires.is_(None), t.c.expires > time.time()))
    if full_name is not None:
        query = query.where(t.c.full_name == full_name)
    rows = connection.execute(query.order_by(t.c.full_name, t.c.number, t.c.holder))
    return [Lease(row.full_name, row.number, row.holder, row.expires) for row in rows]
