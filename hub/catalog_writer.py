"""Writes the catalog's rows, inside one writing transaction of the catalog's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

import sqlalchemy as sa

from hub import catalog_rows, tables
from hub.catalog_rows import Record
from hub.errors import AliasMoved
from hub.manifest import content_of
from hub.refs import Digest
from hub.search import metric_numbers
from hub.versions import AliasState, EventKind, Held

Step = Callable[[str], None]  # called with the name of each step just before it; tests cut the run there


class Writer:
    """One write: rows change and events are appended together, and become visible together."""

    def __init__(self, connection: sa.Connection, step: Step, actor: str | None) -> None:
        self.connection = connection
        self.step = step
        self.time = now()  # one for all that it writes: rows and events tell the same story
        self.batch: int | None = None  # seq of the first event, once there is one
        self._actor = actor
        self._seq = 0

    def append(
        self, kind: EventKind, record: Record, alias: str | None = None, *, before: Held | None = None,
        after: Held | None = None, note: str | None = None,
    ) -> int:  # fmt: skip
        """Enter an event under the next number, which it returns."""
        self._seq = (self._seq or catalog_rows.last_seq(self.connection)) + 1
        if self.batch is None:
            self.batch = self._seq
        self.step("catalog:event")
        self.connection.execute(
            sa.insert(tables.events).values(
                seq=self._seq, batch=self.batch, kind=kind, full_name=record.full_name, alias=alias,
                number=record.number, digest=record.digest, time=self.time, actor=self._actor,
                before=None if before is None else json.dumps(before),
                after=None if after is None else json.dumps(after), note=note,
            )
        )  # fmt: skip
        return self._seq

    def new_version(self, full_name: str, digest: Digest, manifest: bytes) -> Record:
        """Enter a version under its adapter's next number."""
        adapters = tables.adapters
        row = self.connection.execute(sa.select(adapters).where(adapters.c.full_name == full_name)).first()
        number = 1 if row is None else row.next_number
        self.step("catalog:version")
        if row is None:
            self.connection.execute(sa.insert(adapters).values(full_name=full_name, next_number=number + 1))
        else:
            here = sa.update(adapters).where(adapters.c.full_name == full_name)
            self.connection.execute(here.values(next_number=number + 1))
        record = Record(full_name, number, digest, manifest)
        insert_version(self.connection, record)
        self.append("push", record)
        return record

    def point(
        self, full_name: str, alias: str, held: AliasState | None, wanted: Sequence[tuple[Record, int]],
        note: str | None = None,
    ) -> None:  # fmt: skip
        """Move `alias` from `held` (None: absent) to these versions and weights.

        Moving it to where it is changes nothing and enters no event. Raises AliasMoved where somebody moved it since
        `held` was read.
        """
        ordered = sorted(wanted, key=lambda item: item[0].number)
        after = tuple((record.number, weight) for record, weight in ordered)
        before = catalog_rows.held_by(held)
        if before == after:
            return
        self.step("catalog:alias")
        heaviest = min(ordered, key=lambda item: (-item[1], item[0].number))[0]
        seq = self.append("tag", heaviest, alias, before=before, after=after, note=note)
        here = (tables.aliases.c.full_name == full_name, tables.aliases.c.alias == alias)
        if held is None:
            row = {"full_name": full_name, "alias": alias, "generation": seq}
            self.connection.execute(sa.insert(tables.aliases).values(row))
        else:
            swap = sa.update(tables.aliases).where(*here, tables.aliases.c.generation == held.generation)
            if self.connection.execute(swap.values(generation=seq)).rowcount != 1:
                raise AliasMoved(f"{full_name}:{alias} was moved by somebody else just now")
            self.connection.execute(_targets_of(full_name, alias))
        self.connection.execute(
            sa.insert(tables.targets),
            [
                {"full_name": full_name, "alias": alias, "number": record.number, "weight": weight}
                for record, weight in ordered
            ],
        )

    def drop_alias(self, record: Record, alias: str, held: AliasState) -> None:
        """Remove an alias that holds `held`, whose heaviest version is `record`."""
        self.step("catalog:alias")
        self.append("untag", record, alias, before=catalog_rows.held_by(held))
        here = (tables.aliases.c.full_name == record.full_name, tables.aliases.c.alias == alias)
        self.connection.execute(_targets_of(record.full_name, alias))
        self.connection.execute(sa.delete(tables.aliases).where(*here))

    def mark_removed(self, record: Record, time_: str | None) -> None:
        """Set or (None) clear a version's mark of removal."""
        self.connection.execute(
            sa.update(tables.versions).where(*same_version(tables.versions, record)).values(removed=time_)
        )

    def purge(self, record: Record) -> None:
        """Take a version's rows away for good; its number stays given."""
        self.step("catalog:purge")
        for table in (tables.files, tables.metrics, tables.leases, tables.versions):
            self.connection.execute(sa.delete(table).where(*same_version(table, record)))
        self.connection.execute(
            sa.insert(tables.purged).values(
                full_name=record.full_name, number=record.number, digest=record.digest, time=self.time
            )
        )
        self.append("purge", record)


@dataclass(frozen=True)
class Derived:
    """What the tables say of a version beside its manifest: all of it follows from the manifest."""

    content: str
    base_name: str | None
    base_fingerprint: str | None
    files: dict[str, str]  # digests by name
    metrics: dict[str, float]

    @classmethod
    def of(cls, manifest: bytes) -> Self:
        """What a version is entered with whose manifest, in canonical bytes, has been checked."""
        told = json.loads(manifest)
        return cls(
            content_of(manifest), line(told["base"]["name"]), line(told["base"]["fingerprint"]),
            {name: entry["sha256"] for name, entry in told["files"].items()}, dict(metric_numbers(told["metrics"])),
        )  # fmt: skip


def insert_version(connection: sa.Connection, record: Record) -> None:
    """Enter a version's rows: itself, its files, its metrics. Its manifest has been checked."""
    key: dict[str, Any] = {"full_name": record.full_name, "number": record.number}
    own = {"digest": record.digest, "manifest": record.manifest.decode(), "removed": record.removed}
    derived = Derived.of(record.manifest)
    columns = {column: getattr(derived, column) for column in ("content", "base_name", "base_fingerprint")}
    connection.execute(sa.insert(tables.versions).values(**key, **own, **columns))
    files = [{**key, "name": name, "sha256": sha256} for name, sha256 in derived.files.items()]
    connection.execute(sa.insert(tables.files), files)
    if metrics := [{**key, "name": name, "value": value} for name, value in derived.metrics.items()]:
        connection.execute(sa.insert(tables.metrics), metrics)


def same_version(table: sa.Table, record: Record) -> tuple[sa.ColumnElement[bool], sa.ColumnElement[bool]]:
    """The conditions that a row of `table` is about this version."""
    return table.c.full_name == record.full_name, table.c.number == record.number


def line(text: str | None) -> str | None:
    """`text` where it is one printable line: databases take no NUL."""
    return text if text is not None and text.isprintable() else None


def now() -> str:
    """The time as the hub writes it: RFC 3339, UTC, whole seconds."""
    return stamp(time.time())


def stamp(seconds: float) -> str:
    """A Unix time as the hub writes it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _targets_of(full_name: str, alias: str) -> sa.Delete:
    return sa.delete(tables.targets).where(tables.targets.c.full_name == full_name, tables.targets.c.alias == alias)
