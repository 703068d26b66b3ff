"""Enters versions of another hub, inside a writing transaction of the catalog's: all of them or none.

A version keeps its digest always, and its number where that was never given here. Where it was, the import is refused,
or (`renumber`) the version gets the next number: the digest is what it is, a number is what one hub calls it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from hub import catalog_removal, catalog_rows, catalog_signatures, tables
from hub.arrivals import AliasArrival, Outcome
from hub.catalog_rows import Record
from hub.catalog_writer import Writer, insert_version
from hub.errors import BundleRefused, VersionClash
from hub.refs import LATEST, Digest

_LARGEST_STEP = 1_000_000  # numbers end somewhere; nobody uses them up with one import


@dataclass(frozen=True)
class Adoption:
    """A version about to be entered; its blobs are stored already."""

    full_name: str
    number: int  # in the hub it comes from
    digest: Digest
    content: Digest
    manifest: bytes
    signatures: tuple[Digest, ...]

    @property
    def text(self) -> str:
        """As people write it there."""
        return f"{self.full_name}@{self.number}"


Entered = tuple[Record, Outcome, int]  # the version here, what became of it, how many signatures are new


def adopt(
    writer: Writer, adoptions: Sequence[Adoption], aliases: Sequence[AliasArrival], *, renumber: bool
) -> list[Entered]:
    """Enter what is not there, in the order of names and numbers; then the aliases but ":latest".

    That follows where the newest version here is among what arrived, and never goes back to an older one. Raises
    VersionClash, BundleRefused.
    """
    entered: dict[tuple[str, int], Entered] = {}
    for adoption in sorted(adoptions, key=lambda each: (each.full_name, each.number)):
        record, outcome = _entered(writer, adoption, renumber=renumber)
        added = sum(catalog_signatures.enter(writer, record, signature) for signature in adoption.signatures)
        entered[adoption.full_name, adoption.number] = record, outcome, added
    for name in sorted({adoption.full_name for adoption in adoptions}):
        _follow(writer, name, [found for (whose, _), found in entered.items() if whose == name])
    for alias in aliases:
        _point(
            writer, alias, {number: found[0] for (whose, number), found in entered.items() if whose == alias.full_name}
        )
    return [entered[adoption.full_name, adoption.number] for adoption in adoptions]


def _entered(writer: Writer, adoption: Adoption, *, renumber: bool) -> tuple[Record, Outcome]:
    connection, v = writer.connection, tables.versions.c
    known = catalog_rows.select_record(connection, v.digest == adoption.digest)
    if known is not None:
        return (known, "known") if known.removed is None else (catalog_removal.bring_back(writer, known), "restored")
    same = catalog_rows.select_record(connection, v.full_name == adoption.full_name, v.content == adoption.content)
    if same is not None:
        raise VersionClash(
            f"{adoption.text} cannot keep its identity: {same.text} here has the same content, pushed on its own with "
            f"another origin ({same.digest[:19]}…); use that one, or export without {adoption.text}"
        )
    a = tables.adapters
    row = connection.execute(sa.select(a.c.next_number).where(a.c.full_name == adoption.full_name)).first()
    following = 1 if row is None else int(row.next_number)
    number = adoption.number
    if _was_given(connection, adoption.full_name, number):
        p = tables.purged.c
        mine = (p.full_name == adoption.full_name, p.number == number, p.digest == adoption.digest)
        if not renumber and (gone := connection.execute(sa.select(p.time).where(*mine)).scalar()):
            raise VersionClash(
                f"{adoption.text} was here and was swept at {gone}; numbers are given once: import with --renumber to "
                f"give it the next one, {adoption.full_name}@{following} (its digest stays)"
            )
        if not renumber:
            raise VersionClash(
                f"{adoption.text} is other content here than in the bundle: import with --renumber to give it the next "
                f"number, {adoption.full_name}@{following} (its digest stays)"
            )
        number = following
    if number > following + _LARGEST_STEP:
        raise BundleRefused(f"{adoption.text}: the number is too far from the next one here, {following}")
    writer.step("catalog:version")
    if row is None:
        connection.execute(sa.insert(a).values(full_name=adoption.full_name, next_number=number + 1))
    elif number >= following:
        connection.execute(sa.update(a).where(a.c.full_name == adoption.full_name).values(next_number=number + 1))
    record = Record(adoption.full_name, number, adoption.digest, adoption.manifest)
    insert_version(connection, record)
    writer.append("push", record, note="import" if number == adoption.number else f"import: was {adoption.text}")
    return record, "imported"


def _was_given(connection: sa.Connection, full_name: str, number: int) -> bool:
    """Whether a version ever had this number here; events are never forgotten."""
    e = tables.events.c
    query = sa.select(e.seq).where(e.full_name == full_name, e.number == number, e.kind == "push").limit(1)
    return connection.execute(query).first() is not None


def _follow(writer: Writer, full_name: str, found: Sequence[Entered]) -> None:
    fresh = [record for record, outcome, _ in found if outcome != "known"]
    v = tables.versions.c
    query = sa.select(sa.func.max(v.number)).where(v.full_name == full_name, v.removed.is_(None))
    newest = writer.connection.execute(query).scalar()
    for record in fresh:
        if record.number == newest:
            held = catalog_rows.alias_state(writer.connection, full_name, LATEST)
            writer.point(full_name, LATEST, held, [(record, 1)], "import")


def _point(writer: Writer, alias: AliasArrival, records: dict[int, Record]) -> None:
    missing = [number for number, _ in alias.held if number not in records]
    if missing or not alias.held:
        raise BundleRefused(f"the alias {alias.full_name}:{alias.alias} holds versions that do not come with it")
    if alias.alias == LATEST:
        return  # it follows what is newest here
    held = catalog_rows.alias_state(writer.connection, alias.full_name, alias.alias)
    wanted = [(records[number], weight) for number, weight in alias.held]
    writer.point(alias.full_name, alias.alias, held, wanted, "import")
