"""Which signatures versions have, inside a transaction of the catalog's.

A signature is a blob; the row that keeps the sweep from it is one of the table `files`, named "signature:<its digits>"
beside the version's own files, and an event "sign", whose note is the signature's digest, tells of it for good.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import sqlalchemy as sa

from hub import tables
from hub.catalog_rows import Record, digest_of
from hub.catalog_writer import Writer, same_version
from hub.errors import SignatureInvalid
from hub.refs import Digest

PREFIX: Final = "signature:"
MAX_SIGNATURES: Final = 64  # of one version


def of(connection: sa.Connection, record: Record) -> list[Digest]:
    """The digests of a version's signatures, in their own order."""
    f = tables.files
    query = sa.select(f.c.sha256).where(*same_version(f, record), f.c.name.startswith(PREFIX)).order_by(f.c.name)
    return [digest_of(found) for found in connection.execute(query).scalars()]


def enter(writer: Writer, record: Record, signature: Digest) -> bool:
    """Note that `record` has this signature; False where that is known. Raises SignatureInvalid for one too many."""
    there = of(writer.connection, record)
    if signature in there:
        return False
    if len(there) >= MAX_SIGNATURES:
        raise SignatureInvalid(f"{record.text} has {MAX_SIGNATURES} signatures; more are not taken")
    insert(writer.connection, record.full_name, record.number, signature)
    writer.append("sign", record, note=signature)
    return True


def insert(connection: sa.Connection, full_name: str, number: int, signature: Digest) -> None:
    """The row alone."""
    row = {"full_name": full_name, "number": number, "name": f"{PREFIX}{signature.hex}", "sha256": signature}
    connection.execute(sa.insert(tables.files).values(row))


def everywhere(connection: sa.Connection) -> Iterator[tuple[str, int, Digest]]:
    """All signatures: name and number of the version, digest of the signature."""
    f = tables.files
    query = sa.select(f.c.full_name, f.c.number, f.c.sha256).where(f.c.name.startswith(PREFIX))
    for row in connection.execute(query):
        yield row.full_name, row.number, digest_of(row.sha256)
