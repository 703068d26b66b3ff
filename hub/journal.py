"""The journal beside the blobs: every event once more, so that a catalog that is lost can be made anew.

One record a write (or, for hubs older than the journal, a thousand events), kept under the number of its first event:

    <canonical JSON: {"schema": "loraplex.journal/1", "events": [{…}, …]}>\\n
    <64 hex digits: SHA-256 of the line above>\\n

A record says nothing but what the catalog says, so two processes that write the same one write the same bytes: records
appear once and never change. Record n is written only when all before it are there, so the journal has no holes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Final

from hub import json_text
from hub.errors import BlobCorrupt
from hub.refs import Digest
from hub.versions import Event, Held

SCHEMA: Final = "loraplex.journal/1"
MAX_RECORD_BYTES: Final = 4 * 1024 * 1024
OTHER_STORY: Final = (
    "the journal beside the blobs tells another story than the catalog: a second catalog writes here, or this one was "
    "put back from a backup; `hub fsck` says where they part, `hub fsck --rebuild` takes the journal's"
)


class Journal(ABC):
    """Records by number; every storage engine has one beside its blobs. All raise HubUnavailable where it fails."""

    @abstractmethod
    def put(self, batch: int, data: bytes) -> None:
        """Store a record; on return it survives a crash.

        A record that is there already with these bytes is left alone; with others, raises HubUnavailable: another
        catalog has written here.
        """

    @abstractmethod
    def has(self, batch: int) -> bool:
        """Whether the record is there."""

    @abstractmethod
    def read(self) -> Iterator[tuple[int, bytes]]:
        """All records, by number, unchecked."""


def encode(events: Sequence[Event]) -> bytes:
    """The record of these events, which share a batch."""
    line = json_text.canonical({"schema": SCHEMA, "events": [_to_json(event) for event in events]})
    return line + b"\n" + hashlib.sha256(line).hexdigest().encode() + b"\n"


def decode(batch: int, data: bytes) -> list[Event]:
    """The events of a record; raises BlobCorrupt where these are not the bytes that were written."""
    line, _, rest = data.partition(b"\n")
    if rest != hashlib.sha256(line).hexdigest().encode() + b"\n":
        raise BlobCorrupt(f"record {batch} of the journal is damaged")
    try:
        value = json_text.parse_object(line, max_bytes=MAX_RECORD_BYTES)
        if value["schema"] != SCHEMA:
            raise ValueError("has a schema this release does not read")
        events = [_from_json(item, batch) for item in value["events"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BlobCorrupt(f"record {batch} of the journal {error}") from error
    if [event.seq for event in events] != list(range(batch, batch + len(events))):
        raise BlobCorrupt(f"record {batch} of the journal holds other events than its name says")
    return events


def read_events(journal: Journal) -> Iterator[Event]:
    """All events, in order; raises BlobCorrupt at a record that is damaged or missing."""
    expected = 1
    for batch, data in journal.read():
        if batch != expected:
            raise BlobCorrupt(f"the journal lacks record {expected}; the next one is {batch}")
        events = decode(batch, data)
        yield from events
        expected += len(events)


def _to_json(event: Event) -> dict[str, Any]:
    return {
        "seq": event.seq,
        "kind": event.kind,
        "name": event.full_name,
        "alias": event.alias,
        "number": event.version,
        "digest": event.digest,
        "time": event.time,
        "actor": event.actor,
        "before": event.before,
        "after": event.after,
        "note": event.note,
    }


def _from_json(value: dict[str, Any], batch: int) -> Event:
    return Event(
        value["seq"], value["kind"], value["name"], value["alias"], value["number"], Digest.parse(value["digest"]),
        value["time"], value["actor"], held(value["before"]), held(value["after"]), value["note"], batch,
    )  # fmt: skip


def held(value: Any) -> Held | None:
    """What an alias held, from JSON."""
    return None if value is None else tuple((int(number), int(weight)) for number, weight in value)
