"""Makes a catalog anew from what lies beside it: the journal and the manifests among the blobs.

A catalog that still works helps: what the journal and the blobs lack of its events and manifests is taken from there
first. What is lost all the same leaves as a purge does, with events that say so, so that the hub made anew is sound.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Final

import sqlalchemy as sa

from hub import catalog_signatures, location, sqlite, tables
from hub.blobs import BlobStore
from hub.catalog import Catalog
from hub.catalog_rows import Record
from hub.catalog_writer import Writer, insert_version
from hub.errors import BlobCorrupt, BlobNotFound, HubError, HubNotFound, HubTooNew, HubUnavailable
from hub.journal import Journal, decode, encode, read_events
from hub.location import Place
from hub.manifest import MAX_MANIFEST_BYTES, Manifest
from hub.past import all_events
from hub.refs import Digest
from hub.replay import Key, State, replay
from hub.verify import copy_checked
from hub.versions import Event, Held, Problem

LOST: Final = "lost"  # the note of events about what a rebuild could not bring back


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild found."""

    versions: int
    aliases: int
    events: int
    lost: tuple[Problem, ...]  # versions whose manifest is damaged or missing; their numbers stay given
    kept_as: str | None  # the file beside it that the old database is in; "" where it was lost, None in PostgreSQL
    new_file: bool  # the database is another one, without what no journal holds: a shared hub's tokens


def rebuild(url: str | None) -> Rebuilt:
    """Make the catalog of the hub at `url` anew; nothing else may be writing to it.

    Raises HubNotFound, HubUnavailable, HubReadOnly, HubTooNew, BlobCorrupt where the journal is damaged or lacks a
    record and no sound catalog has its events.
    """
    place = Place.parse(url)
    blobs, journal = location.storage(place)
    if next(journal.read(), None) is None and not (place.catalog is not None and place.catalog.exists()):
        raise HubNotFound(f"there is no hub at {place.shown}, or it has no journal to rebuild from")
    location.mend_mark(place)
    copies = _rescued(place, journal)
    events = list(read_events(journal))
    if not events:
        raise HubUnavailable("the hub has no journal to rebuild from; nothing was changed")
    state = replay(events)
    manifests, lost = _manifests(blobs, state, copies)
    with _old_kept(place) as (kept_as, new_file):
        _, catalog = location.make_anew(place)
        try:
            aliases = _fill(catalog, state, events, manifests)
        finally:
            catalog.close()
    return Rebuilt(len(manifests), aliases, len(events), tuple(lost), kept_as, new_file)


def _rescued(place: Place, journal: Journal) -> dict[Digest, bytes]:
    """Every sound manifest in the catalog, where that still works; its last events are in the journal then, too.

    Where all of the catalog is sound, its events also stand in for the journal's damaged and missing records.
    """
    copies: dict[Digest, bytes] = {}
    with _passed_over():
        _, catalog = location.make(place)
        try:
            for record in catalog.records():
                if hashlib.sha256(record.manifest).hexdigest() == record.digest.hex:
                    copies[record.digest] = record.manifest
            if not catalog.behind_journal():
                catalog.settle()
                if not catalog.check():
                    _mend(journal, catalog)
        finally:
            catalog.close()
    return copies


@contextmanager
def _passed_over() -> Iterator[None]:
    """Whatever is wrong with the old catalog, except that it is a newer release's."""
    try:
        yield
    except HubTooNew:
        raise
    except HubError:
        pass


def _mend(journal: Journal, catalog: Catalog) -> None:
    """Write the journal's damaged and missing records again; raises HubUnavailable where it tells another story."""
    sound = set()
    for batch, data in journal.read():
        with suppress(BlobCorrupt):
            decode(batch, data)
            sound.add(batch)
    for batch, events in groupby(all_events(catalog), key=lambda event: event.batch):
        if batch not in sound:
            journal.put(batch, encode(list(events)))


def _manifests(
    blobs: BlobStore, state: State, copies: Mapping[Digest, bytes]
) -> tuple[dict[Key, bytes], list[Problem]]:
    """The manifest of every version; where a blob is damaged or gone it is stored again from `copies`."""
    found: dict[Key, bytes] = {}
    lost: list[Problem] = []
    for key, digest in state.versions.items():
        text = f"{key[0]}@{key[1]}"
        try:
            try:
                data = _stored(blobs, digest, text)
            except (BlobCorrupt, BlobNotFound):
                if digest not in copies:
                    raise
                data = copies[digest]
                blobs.put(io.BytesIO(data))
            if Manifest.parse(data).name != key[0]:
                raise BlobCorrupt(f"the manifest of {text} names another adapter")
        except (BlobCorrupt, BlobNotFound) as error:
            lost.append(Problem(text, "manifest", "BLOB_CORRUPT", str(error)))
            continue
        found[key] = data
    return found, lost


def _stored(blobs: BlobStore, digest: Digest, text: str) -> bytes:
    """The manifest of the version called `text`; raises BlobCorrupt, BlobNotFound."""
    size = blobs.info(digest).bytes
    if size > MAX_MANIFEST_BYTES:
        raise BlobCorrupt(f"the manifest of {text} is damaged in the hub's storage")
    data = bytearray()
    copy_checked(blobs, digest, size, f"the manifest of {text}", data.extend)
    return bytes(data)


@contextmanager
def _old_kept(place: Place) -> Iterator[tuple[str | None, bool]]:
    """See `Rebuilt.kept_as` and `Rebuilt.new_file`. Where what is done inside fails, the old file is what it was.

    One that works is copied, for readers have it open, and its tables are filled anew; any other is moved away.
    """
    file = place.catalog
    if file is None:
        yield None, False
        return
    when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    there = file.exists()
    if there and _works(place):
        copied = file.with_name(f"{file.name}.before-{when}")
        sqlite.copy(file, copied)
        yield copied.name, False
        return
    aside = file.with_name(f"{file.name}.damaged-{when}")
    _move(file, aside)  # where the file is lost, too: SQLite would play what is left of its log into the new one
    try:
        yield aside.name if there else "", True
    except BaseException:
        _move(aside, file)
        raise


def _works(place: Place) -> bool:
    """Whether SQLite finds nothing wrong with the old database file."""
    with suppress(HubError):
        _, catalog = location.make(place)
        try:
            return not [problem for problem in catalog.check() if problem.startswith("SQLite says")]
        finally:
            catalog.close()
    return False


def _move(database: Path, target: Path) -> None:
    """Give the database, and its log, another name, and take away what had that."""
    suffixes = ("-wal", "-shm", "")
    for suffix in suffixes:
        target.with_name(target.name + suffix).unlink(missing_ok=True)
    for suffix in suffixes:
        with suppress(FileNotFoundError):
            database.with_name(database.name + suffix).rename(target.with_name(target.name + suffix))


def _fill(catalog: Catalog, state: State, events: Sequence[Event], manifests: Mapping[Key, bytes]) -> int:
    """Enter everything, and then what became of versions without a manifest; the number of aliases."""
    lost = {key: digest for key, digest in state.versions.items() if key not in manifests}

    def fill(writer: Writer) -> None:
        connection = writer.connection
        for full_name, number in state.next_number.items():
            connection.execute(sa.insert(tables.adapters).values(full_name=full_name, next_number=number))
        for (full_name, number), data in manifests.items():
            digest = state.versions[full_name, number]
            record = Record(full_name, number, digest, data, state.removed.get((full_name, number)))
            insert_version(connection, record)
        for (full_name, number), (digest, when) in state.purged.items():
            _purged(connection, full_name, number, digest, when)
        for full_name, number, holder in state.pins:
            if (full_name, number) in manifests:
                row = {"full_name": full_name, "number": number, "holder": holder, "expires": None}
                connection.execute(sa.insert(tables.leases).values(row))
        for full_name, number, signature in state.signatures:
            if (full_name, number) in manifests:
                catalog_signatures.insert(connection, full_name, number, signature)
        connection.execute(sa.insert(tables.events), [_row(event) for event in events])
        for (full_name, alias), (held, generation) in state.aliases.items():
            left = tuple((number, weight) for number, weight in held if (full_name, number) in manifests)
            _enter_alias(writer, state, (full_name, alias), held, left, generation)
        for (full_name, number), digest in lost.items():
            _purged(connection, full_name, number, digest, writer.time)
            writer.append("purge", Record(full_name, number, digest, b""), note=LOST)

    catalog.replace(fill)
    return sum(
        any((full_name, number) in manifests for number, _ in held)
        for (full_name, _), (held, _) in state.aliases.items()
    )


def _enter_alias(writer: Writer, state: State, name: tuple[str, str], held: Held, left: Held, generation: int) -> None:
    """An alias that held `held`, with what is `left` of that, and the event of what it lost."""
    full_name, alias = name
    number = max(left or held, key=lambda item: (item[1], -item[0]))[0]
    record = Record(full_name, number, state.versions[full_name, number], b"")
    if not left:
        writer.append("untag", record, alias, before=held, note=LOST)
        return
    if left != held:
        generation = writer.append("tag", record, alias, before=held, after=left, note=LOST)
    key = {"full_name": full_name, "alias": alias}
    writer.connection.execute(sa.insert(tables.aliases).values(**key, generation=generation))
    targets = [{**key, "number": number, "weight": weight} for number, weight in left]
    writer.connection.execute(sa.insert(tables.targets), targets)


def _purged(connection: sa.Connection, full_name: str, number: int, digest: Digest, when: str) -> None:
    row = {"full_name": full_name, "number": number, "digest": digest, "time": when}
    connection.execute(sa.insert(tables.purged).values(row))


def _row(event: Event) -> dict[str, object]:
    return {
        "seq": event.seq, "batch": event.batch, "kind": event.kind, "full_name": event.full_name,
        "alias": event.alias, "number": event.version, "digest": event.digest, "time": event.time,
        "actor": event.actor, "before": None if event.before is None else json.dumps(event.before),
        "after": None if event.after is None else json.dumps(event.after), "note": event.note,
    }  # fmt: skip
