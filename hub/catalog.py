"""The catalog: which versions exist, what the aliases hold, and a journal of every change.

One write is one transaction: version, alias moves and their events appear together or not at all. Event numbers are
given inside it, so they have no gaps and readers see them in order. Only SQLAlchemy Core is used and nothing of one
database's own, so that another engine means another `open_engine` (see `hub.sqlite`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from hub.errors import AdapterNotFound, AliasMoved, AliasNotFound, HubUnavailable, VersionNotFound
from hub.refs import LATEST, AdapterRef, Alias, Digest, Version
from hub.sqlite import WRITING
from hub.tables import adapters as _adapters
from hub.tables import aliases as _aliases
from hub.tables import events as _events
from hub.tables import versions as _versions
from hub.versions import AliasState, Event

Step = Callable[[str], None]  # called with the name of each step just before it; tests cut the run there


@dataclass(frozen=True)
class Record:
    """One row of the versions table."""

    full_name: str
    number: int
    digest: Digest
    manifest: bytes  # canonical JSON, not yet checked against `digest`


@dataclass(frozen=True)
class Publication:
    """A version about to be entered; its blobs are stored already."""

    full_name: str
    digest: Digest
    content: Digest  # equal contents under one name are one version
    manifest: bytes


class Catalog:
    """The catalog in one database. Methods are safe to call from several threads and processes.

    All raise HubUnavailable where the database cannot be reached, read or written.
    """

    def __init__(self, engine: sa.Engine, *, step: Step = lambda name: None) -> None:
        self._engine = engine
        self._step = step

    def close(self) -> None:
        """Give back the connections."""
        self._engine.dispose()

    def publish(self, publication: Publication, aliases: Sequence[str]) -> tuple[Record, bool]:
        """Enter a version and point `aliases` at it; the version's record, and whether it is new.

        A new version also takes the alias "latest". Content that is there under this name already stays the version it
        is: only `aliases` move.
        """
        with self._writing() as connection:
            record = _select_record(
                connection, _versions.c.full_name == publication.full_name, _versions.c.content == publication.content
            )
            created = record is None
            if record is None:
                record = self._insert(connection, publication)
            for alias in dict.fromkeys([LATEST, *aliases] if created else aliases):
                self._point(connection, record, alias, _alias_row(connection, record.full_name, alias))
            self._step("catalog:commit")
        self._step("catalog:committed")
        return record, created

    def find(self, full_name: str, content: Digest) -> Record | None:
        """The version of this adapter with this content, if there is one."""
        with self._reading() as connection:
            return _select_record(connection, _versions.c.full_name == full_name, _versions.c.content == content)

    def resolve(self, ref: AdapterRef) -> Record:
        """The version that `ref` names now; raises AdapterNotFound, VersionNotFound or AliasNotFound."""
        with self._reading() as connection:
            return _resolve(connection, ref)

    def get(self, digest: Digest) -> Record:
        """The version with this digest; raises AdapterNotFound."""
        with self._reading() as connection:
            record = _select_record(connection, _versions.c.digest == digest)
        if record is None:
            raise AdapterNotFound(f"there is no version {digest} in this hub")
        return record

    def records(self) -> list[Record]:
        """All versions, by name and number."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(_versions).order_by(_versions.c.full_name, _versions.c.number))
            return [_record(row) for row in rows]

    def aliases(self, full_name: str) -> dict[str, AliasState]:
        """What every alias of an adapter holds, by alias; raises AdapterNotFound."""
        with self._reading() as connection:
            _check_known(connection, full_name)
            query = (
                sa.select(_aliases.c.alias, _aliases.c.number, _aliases.c.generation, _versions.c.digest)
                .join(_versions)
                .where(_aliases.c.full_name == full_name)
                .order_by(_aliases.c.alias)
            )
            return {
                row.alias: AliasState(row.number, Digest(row.digest), row.generation)
                for row in connection.execute(query)
            }

    def tag(self, ref: AdapterRef, alias: str, expect: int | None) -> Record:
        """Point `alias` at the version `ref` names.

        With `expect` only if it holds that version number now (0: does not exist); raises AliasMoved otherwise, and
        what `resolve` raises. Pointing an alias at what it holds already changes nothing and enters no event.
        """
        with self._writing() as connection:
            record = _resolve(connection, ref)
            row = _alias_row(connection, record.full_name, alias)
            held = row.number if row is not None else 0
            if expect is not None and held != expect:
                holds = f"holds version {held}" if held else "does not exist"
                wanted = f"version {expect}" if expect else "it not to exist"
                raise AliasMoved(f"{record.full_name}:{alias} {holds}, you expected {wanted}")
            self._point(connection, record, alias, row)
            self._step("catalog:commit")
        self._step("catalog:committed")
        return record

    def untag(self, full_name: str, alias: str, expect: int | None) -> Record:
        """Remove an alias; the version it held. Raises AliasNotFound, AliasMoved (see `tag`), AdapterNotFound."""
        with self._writing() as connection:
            record = _resolve(connection, AdapterRef(*_split(full_name), Alias(alias)))
            if expect is not None and record.number != expect:
                raise AliasMoved(f"{full_name}:{alias} holds version {record.number}, you expected version {expect}")
            self._step("catalog:alias")
            connection.execute(sa.delete(_aliases).where(_aliases.c.full_name == full_name, _aliases.c.alias == alias))
            self._append(connection, "untag", record, alias)
            self._step("catalog:commit")
        self._step("catalog:committed")
        return record

    def events(self, since_seq: int, limit: int) -> list[Event]:
        """Up to `limit` events with seq > `since_seq`, in order."""
        with self._reading() as connection:
            query = sa.select(_events).where(_events.c.seq > since_seq).order_by(_events.c.seq).limit(limit)
            return [
                Event(row.seq, row.kind, row.full_name, row.alias, row.number, Digest(row.digest), row.time)
                for row in connection.execute(query)
            ]

    def last_seq(self) -> int:
        """The newest event's number, 0 where nothing happened yet."""
        with self._reading() as connection:
            return _last_seq(connection)

    def check(self) -> list[str]:
        """What is wrong with the database itself, in words; empty where nothing is."""
        with self._reading() as connection:
            count = connection.execute(sa.select(sa.func.count()).select_from(_events)).scalar_one()
            wrong = []
            if count != _last_seq(connection):
                wrong.append(f"the journal has {count} events, but the newest is number {_last_seq(connection)}")
            dangling = sa.select(_aliases).outerjoin(_versions).where(_versions.c.number.is_(None))
            wrong += [
                f"{row.full_name}:{row.alias} holds version {row.number}, which is not there"
                for row in connection.execute(dangling)
            ]
            return wrong

    def _insert(self, connection: sa.Connection, new: Publication) -> Record:
        name = new.full_name
        row = connection.execute(sa.select(_adapters).where(_adapters.c.full_name == name)).first()
        number = 1 if row is None else row.next_number
        self._step("catalog:version")
        if row is None:
            connection.execute(sa.insert(_adapters).values(full_name=name, next_number=number + 1))
        else:
            connection.execute(sa.update(_adapters).where(_adapters.c.full_name == name).values(next_number=number + 1))
        record = Record(name, number, new.digest, new.manifest)
        connection.execute(
            sa.insert(_versions).values(
                full_name=name, number=number, digest=new.digest, content=new.content, manifest=new.manifest.decode()
            )
        )
        self._append(connection, "push", record, None)
        return record

    def _point(self, connection: sa.Connection, record: Record, alias: str, held: Any) -> None:
        """Move `alias` from the row `held` (None: absent) to `record`, provided nobody moved it meanwhile."""
        if held is not None and held.number == record.number:
            return
        self._step("catalog:alias")
        seq = self._append(connection, "tag", record, alias)
        if held is None:
            connection.execute(
                sa.insert(_aliases).values(
                    full_name=record.full_name, alias=alias, number=record.number, generation=seq
                )
            )
            return
        here = (_aliases.c.full_name == record.full_name, _aliases.c.alias == alias)
        moved = connection.execute(
            sa.update(_aliases)
            .where(*here, _aliases.c.generation == held.generation)
            .values(number=record.number, generation=seq)
        )
        if moved.rowcount != 1:
            raise AliasMoved(f"{record.full_name}:{alias} was moved by somebody else just now")

    def _append(self, connection: sa.Connection, kind: str, record: Record, alias: str | None) -> int:
        seq = _last_seq(connection) + 1
        self._step("catalog:event")
        connection.execute(
            sa.insert(_events).values(
                seq=seq, kind=kind, full_name=record.full_name, alias=alias, number=record.number,
                digest=record.digest, time=now(),
            )
        )  # fmt: skip
        return seq

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with _translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with _translated():
            self._step("catalog:begin")
            with self._engine.execution_options(**{WRITING: True}).begin() as connection:
                yield connection


def now() -> str:
    """The time as the hub writes it: RFC 3339, UTC, whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sa.exc.DBAPIError, sa.exc.TimeoutError) as error:
        # The driver's own words name no path, except when it cannot open the file.
        cause = str(getattr(error, "orig", None) or type(error).__name__)
        raise HubUnavailable(f"the hub's catalog cannot be used: {cause}") from error


def _resolve(connection: sa.Connection, ref: AdapterRef) -> Record:
    name, selector = ref.full_name, ref.selector
    if isinstance(selector, Alias):
        row = _alias_row(connection, name, selector.name)
        number = row.number if row is not None else None
        found = number and _select_record(connection, _versions.c.full_name == name, _versions.c.number == number)
    elif isinstance(selector, Version):
        found = _select_record(connection, _versions.c.full_name == name, _versions.c.number == selector.number)
    else:
        found = _select_record(connection, _versions.c.full_name == name, _versions.c.digest == selector)
    if found:
        return found
    _check_known(connection, name)
    if isinstance(selector, Alias):
        raise AliasNotFound(f"{name} has no alias {selector.name!r}")
    raise VersionNotFound(f"{name} has no version {str(selector).removeprefix('@')}")


def _check_known(connection: sa.Connection, full_name: str) -> None:
    if connection.execute(sa.select(_adapters).where(_adapters.c.full_name == full_name)).first() is None:
        raise AdapterNotFound(f"there is no adapter {full_name!r} in this hub")


def _alias_row(connection: sa.Connection, full_name: str, alias: str) -> Any:
    query = sa.select(_aliases).where(_aliases.c.full_name == full_name, _aliases.c.alias == alias)
    return connection.execute(query).first()


def _select_record(connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> Record | None:
    row = connection.execute(sa.select(_versions).where(*conditions)).first()
    return None if row is None else _record(row)


def _record(row: Any) -> Record:
    return Record(row.full_name, row.number, Digest(row.digest), row.manifest.encode())


def _last_seq(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.max(_events.c.seq), 0))).scalar_one())


def _split(full_name: str) -> tuple[str | None, str]:
    namespace, slash, name = full_name.rpartition("/")
    return (namespace if slash else None), name
