"""Reads the catalog's rows, inside a transaction of the caller's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from hub import canary, journal, tables
from hub.errors import AdapterNotFound, AliasNotFound, HubUnavailable, RefInvalid, VersionNotFound
from hub.refs import AdapterRef, Alias, Digest, Version
from hub.versions import AliasState, Event, Held, Target


@dataclass(frozen=True)
class Record:
    """One row of the versions table."""

    full_name: str
    number: int
    digest: Digest
    manifest: bytes  # canonical JSON, not yet checked against `digest`
    removed: str | None = None  # when it was marked as removed

    @property
    def text(self) -> str:
        """As people write it: "team/sentiment@3"."""
        return f"{self.full_name}@{self.number}"


def _states() -> sa.Select[Any]:
    a, t, v = tables.aliases, tables.targets, tables.versions
    return (
        sa.select(a.c.alias, a.c.generation, t.c.number, t.c.weight, v.c.digest)
        .join(t, (t.c.full_name == a.c.full_name) & (t.c.alias == a.c.alias))
        .join(v, (v.c.full_name == t.c.full_name) & (v.c.number == t.c.number))
        .where(a.c.full_name == sa.bindparam("full_name"))
        .order_by(a.c.alias, t.c.number)
    )


# What every resolution asks, built once: building one takes longer than the database does to answer it.
_ALL_STATES = _states()
_ONE_STATE = _ALL_STATES.where(tables.aliases.c.alias == sa.bindparam("alias"))
_LAST_SEQ = sa.select(sa.func.coalesce(sa.func.max(tables.events.c.seq), 0))
_AT = _LAST_SEQ.scalar_subquery().label("seq")
_HELD = (
    sa.select(tables.versions, tables.targets.c.weight, _AT)
    .join(
        tables.targets, sa.and_(*(tables.targets.c[key] == tables.versions.c[key] for key in ("full_name", "number")))
    )
    .where(tables.targets.c.full_name == sa.bindparam("full_name"), tables.targets.c.alias == sa.bindparam("alias"))
    .order_by(tables.targets.c.number)
)
_ONE = sa.select(tables.versions, _AT).where(tables.versions.c.full_name == sa.bindparam("full_name"))
_NUMBERED = _ONE.where(tables.versions.c.number == sa.bindparam("number"))
_DIGESTED = _ONE.where(tables.versions.c.digest == sa.bindparam("digest"))


def resolve(connection: sa.Connection, ref: AdapterRef, key: str | None = None) -> Record:
    """The version that `ref` names now; of a weighted alias the one that `key` gets, without a key the heaviest.

    Raises AdapterNotFound, VersionNotFound (also for one that is removed) or AliasNotFound.
    """
    return resolve_at(connection, ref, key)[0]


def resolve_at(connection: sa.Connection, ref: AdapterRef, key: str | None = None) -> tuple[Record, int]:
    """As `resolve`, with the newest event's number."""
    found = named(connection, ref, key)
    if found is not None:
        return found
    name, selector = ref.full_name, ref.selector
    check_known(connection, name)
    if isinstance(selector, Alias):
        raise AliasNotFound(f"{name} has no alias {selector.name!r}")
    raise _no_version(name, str(selector).removeprefix("@"))


def named(connection: sa.Connection, ref: AdapterRef, key: str | None = None) -> tuple[Record, int] | None:
    """As `resolve_at`, by one statement; None where there is no such version or alias."""
    name, selector = ref.full_name, ref.selector
    if isinstance(selector, Alias):
        rows = connection.execute(_HELD, {"full_name": name, "alias": selector.name}).all()
        if not rows:
            return None
        targets = [Target(row.number, digest_of(row.digest), row.weight) for row in rows]
        chosen = canary.primary(targets) if key is None else canary.pick(targets, name, selector.name, key)
        row: Any = rows[targets.index(chosen)]
    elif isinstance(selector, Version):
        row = connection.execute(_NUMBERED, {"full_name": name, "number": selector.number}).first()
    else:
        row = connection.execute(_DIGESTED, {"full_name": name, "digest": selector}).first()
    return None if row is None else (standing(record_of(row)), row.seq)


def there(connection: sa.Connection, full_name: str, number: int) -> Record:
    """The version with this number; raises VersionNotFound where it is not there or removed, AdapterNotFound."""
    record = numbered(connection, full_name, number)
    if record is None:
        check_known(connection, full_name)
        raise _no_version(full_name, number)
    return standing(record)


def _no_version(full_name: str, shown: str | int) -> VersionNotFound:
    return VersionNotFound(f"{full_name} has no version {shown}")


def standing(record: Record) -> Record:
    """The record; raises VersionNotFound where it is marked as removed."""
    if record.removed is not None:
        raise VersionNotFound(f"{record.text} was removed; while it is not swept, `hub restore {record.text}` helps")
    return record


def numbered(connection: sa.Connection, full_name: str, number: int) -> Record | None:
    """The version with this number, removed or not."""
    row = connection.execute(_NUMBERED, {"full_name": full_name, "number": number}).first()
    return None if row is None else record_of(row)


def select_record(connection: sa.Connection, *conditions: sa.ColumnElement[bool]) -> Record | None:
    """The one version that meets the conditions, removed or not."""
    row = connection.execute(sa.select(tables.versions).where(*conditions)).first()
    return None if row is None else record_of(row)


def record_of(row: Any) -> Record:
    """A row of the versions table as a value; raises HubUnavailable where it is damaged."""
    removed = row.removed or ""
    if not (_all(str, row.full_name, row.manifest, removed) and _all(int, row.number)):
        raise _damaged("a version")
    return Record(row.full_name, row.number, digest_of(row.digest), row.manifest.encode(), row.removed)


def digest_of(text: str) -> Digest:
    """A digest as a table holds it; raises HubUnavailable where it is damaged."""
    try:
        return Digest.parse(text)
    except (RefInvalid, TypeError) as error:
        raise _damaged("a digest") from error


def _all(kind: type, *values: object) -> bool:
    # A database without strict types may hold anything in a damaged row.
    return all(isinstance(value, kind) for value in values)


def _damaged(what: str) -> HubUnavailable:
    return HubUnavailable(
        "the hub's catalog cannot be used", f"{what} in it is damaged; `hub fsck --rebuild` makes it anew"
    )


def check_known(connection: sa.Connection, full_name: str) -> None:
    """Raise AdapterNotFound where no version of this name was ever pushed."""
    if connection.execute(sa.select(tables.adapters).where(tables.adapters.c.full_name == full_name)).first() is None:
        raise AdapterNotFound(f"there is no adapter {full_name!r} in this hub")


def alias_state(connection: sa.Connection, full_name: str, alias: str) -> AliasState | None:
    """What one alias holds."""
    return alias_states(connection, full_name, alias).get(alias)


def alias_states(connection: sa.Connection, full_name: str, alias: str | None = None) -> dict[str, AliasState]:
    """What every alias of an adapter (or this one) holds, by alias."""
    query = _ALL_STATES if alias is None else _ONE_STATE
    targets: dict[tuple[str, int], list[Target]] = {}
    for row in connection.execute(query, {"full_name": full_name, "alias": alias}):
        targets.setdefault((row.alias, row.generation), []).append(
            Target(row.number, digest_of(row.digest), row.weight)
        )
    return {name: state_of(found, generation) for (name, generation), found in targets.items()}


def known_alias_states(connection: sa.Connection, full_name: str) -> dict[str, AliasState]:
    """As `alias_states`; raises AdapterNotFound where there is no such adapter."""
    check_known(connection, full_name)
    return alias_states(connection, full_name)


def state_of(targets: Sequence[Target], generation: int) -> AliasState:
    """An alias with these targets."""
    first = canary.primary(targets)
    return AliasState(first.version, first.digest, generation, tuple(targets))


def held_by(state: AliasState | None) -> Held | None:
    """What an alias holds, as events tell it."""
    return None if state is None else tuple((target.version, target.weight) for target in state.targets)


def last_seq(connection: sa.Connection) -> int:
    """The newest event's number, 0 where nothing happened yet."""
    return int(connection.execute(_LAST_SEQ).scalar_one())


def last_batch(connection: sa.Connection, before: int | None = None) -> int | None:
    """The number of the newest write, of those before write `before`; None where there is none."""
    b = tables.events.c.batch
    query = sa.select(sa.func.max(b))
    found: int | None = connection.execute(query if before is None else query.where(b < before)).scalar()
    return found


def events_of(connection: sa.Connection, batch: int) -> list[Event]:
    """The events of one write, in order."""
    return select_events(connection, tables.events.c.batch == batch)


def select_events(
    connection: sa.Connection, *conditions: sa.ColumnElement[bool], limit: int | None = None
) -> list[Event]:
    """Events that meet the conditions, in order."""
    query = sa.select(tables.events).where(*conditions).order_by(tables.events.c.seq).limit(limit)
    return [_event(row) for row in connection.execute(query)]


def _held(text: str | None) -> Held | None:
    """What an event says of an alias; raises HubUnavailable where it is damaged."""
    try:
        return journal.held(json.loads(text)) if text else None
    except (ValueError, TypeError) as error:
        raise _damaged("an event") from error


def _event(row: Any) -> Event:
    aliased = row.kind in ("tag", "untag")
    texts = [row.kind, row.full_name, row.time, *([row.alias] if aliased else [])]
    if not (_all(str, *texts) and _all(int, row.number, row.batch)):
        raise _damaged("an event")
    return Event(
        row.seq, row.kind, row.full_name, row.alias, row.number, digest_of(row.digest), row.time, row.actor,
        _held(row.before), _held(row.after),
        row.note, row.batch,
    )  # fmt: skip
