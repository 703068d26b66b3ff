"""Makes a catalog anew from what lies beside it: the journal and the manifests among the blobs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import sqlalchemy as sa

from hub import catalog_signatures, location, tables
from hub.blobs import BlobStore
from hub.catalog import Catalog
from hub.catalog_rows import Record
from hub.catalog_writer import insert_version
from hub.errors import BlobCorrupt, BlobNotFound, HubError, HubNotFound, HubUnavailable
from hub.journal import read_events
from hub.location import Place
from hub.manifest import MAX_MANIFEST_BYTES, Manifest
from hub.replay import State, replay
from hub.verify import copy_checked
from hub.versions import Event, Problem


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild found."""

    versions: int
    aliases: int
    events: int
    lost: tuple[Problem, ...]  # versions whose manifest is damaged or missing; their numbers stay given
    moved_aside: str | None  # the damaged database's new name


def rebuild(url: str | None) -> Rebuilt:
    """Make the catalog of the hub at `url` anew; nothing else may be writing to it.

    Raises HubNotFound, HubUnavailable, BlobCorrupt where the journal itself is damaged or lacks a record.
    """
    place = Place.parse(url)
    blobs, journal = location.storage(place)
    if next(journal.read(), None) is None and not (place.catalog is not None and place.catalog.exists()):
        raise HubNotFound(f"there is no hub at {place.shown}, or it has no journal to rebuild from")
    with suppress(HubError):  # a catalog that still works may know of a last write that the journal lacks
        _, catalog = location.make(place)
        try:
            if not catalog.behind_journal():
                catalog.settle()
        finally:
            catalog.close()
    events = list(read_events(journal))
    if not events:
        raise HubUnavailable("the hub has no journal to rebuild from; nothing was changed")
    state = replay(events)
    manifests, lost = _manifests(blobs, state)
    moved = _empty_catalog(place)
    _, catalog = location.make_anew(place)
    try:
        aliases = _fill(catalog, state, events, manifests)
    finally:
        catalog.close()
    return Rebuilt(len(manifests), aliases, len(events), tuple(lost), moved)


def _manifests(blobs: BlobStore, state: State) -> tuple[dict[tuple[str, int], bytes], list[Problem]]:
    found: dict[tuple[str, int], bytes] = {}
    lost: list[Problem] = []
    for key, digest in state.versions.items():
        text = f"{key[0]}@{key[1]}"
        data = bytearray()
        try:
            size = blobs.info(digest).bytes
            if size > MAX_MANIFEST_BYTES:
                raise BlobCorrupt(f"the manifest of {text} is damaged in the hub's storage")
            copy_checked(blobs, digest, size, f"the manifest of {text}", data.extend)
            if Manifest.parse(bytes(data)).name != key[0]:
                raise BlobCorrupt(f"the manifest of {text} names another adapter")
        except (BlobCorrupt, BlobNotFound) as error:
            lost.append(Problem(text, "manifest", "BLOB_CORRUPT", str(error)))
            continue
        found[key] = bytes(data)
    return found, lost


def _empty_catalog(place: Place) -> str | None:
    """Move a SQLite file that no longer works, or is not there, out of the way; its new name, "" where it was lost."""
    if place.catalog is None:
        return None
    if not place.catalog.exists():
        return ""
    with suppress(HubError):
        _, catalog = location.make(place)
        try:
            if not [problem for problem in catalog.check() if problem.startswith("SQLite says")]:
                return None
        finally:
            catalog.close()
    name = f"{place.catalog.name}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            place.catalog.with_name(place.catalog.name + suffix).rename(place.catalog.with_name(name + suffix))
    return name


def _fill(catalog: Catalog, state: State, events: Sequence[Event], manifests: dict[tuple[str, int], bytes]) -> int:
    """Enter everything; the number of aliases."""
    kept = {
        name: (tuple(item for item in held if (name[0], item[0]) in manifests), generation)
        for name, (held, generation) in state.aliases.items()
    }
    kept = {name: (held, generation) for name, (held, generation) in kept.items() if held}

    def fill(connection: sa.Connection) -> None:
        for full_name, number in state.next_number.items():
            connection.execute(sa.insert(tables.adapters).values(full_name=full_name, next_number=number))
        for (full_name, number), data in manifests.items():
            digest = state.versions[full_name, number]
            record = Record(full_name, number, digest, data, state.removed.get((full_name, number)))
            insert_version(connection, record)
        for (full_name, number), (digest, when) in state.purged.items():
            row = {"full_name": full_name, "number": number, "digest": digest, "time": when}
            connection.execute(sa.insert(tables.purged).values(row))
        for (full_name, alias), (held, generation) in kept.items():
            key = {"full_name": full_name, "alias": alias}
            connection.execute(sa.insert(tables.aliases).values(**key, generation=generation))
            for number, weight in held:
                connection.execute(sa.insert(tables.targets).values(**key, number=number, weight=weight))
        for full_name, number, holder in state.pins:
            if (full_name, number) in manifests:
                row = {"full_name": full_name, "number": number, "holder": holder, "expires": None}
                connection.execute(sa.insert(tables.leases).values(row))
        for full_name, number, signature in state.signatures:
            if (full_name, number) in manifests:
                catalog_signatures.insert(connection, full_name, number, signature)
        if events:
            connection.execute(sa.insert(tables.events), [_row(event) for event in events])

    catalog.replace(fill)
    return len(kept)


def _row(event: Event) -> dict[str, object]:
    return {
        "seq": event.seq, "batch": event.batch, "kind": event.kind, "full_name": event.full_name,
        "alias": event.alias, "number": event.version, "digest": event.digest, "time": event.time,
        "actor": event.actor, "before": None if event.before is None else json.dumps(event.before),
        "after": None if event.after is None else json.dumps(event.after), "note": event.note,
    }  # fmt: skip
