"""Compares what a hub says of itself: the catalog's tables, its events, the journal, and which blobs are there.

Reads no adapter's bytes (that is `hub.verify`), so it is quick on a large hub.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from hub.blobs import BlobStore
from hub.catalog import Catalog, Record
from hub.errors import BlobCorrupt, HubError, HubUnavailable
from hub.manifest import Manifest
from hub.past import all_events
from hub.progress import Progress
from hub.refs import Digest
from hub.versions import Event, Problem


def check(blobs: BlobStore, catalog: Catalog, progress: Progress | None) -> list[Problem]:
    """Everything that does not fit together; empty in a sound hub."""
    problems = [_catalog(text) for text in catalog.check()]
    if catalog.behind_journal():
        problems.append(_catalog("the journal has writes that the catalog lacks: `hub fsck --rebuild` takes them over"))
    try:
        events, records, signatures = all_events(catalog), catalog.records(), catalog.all_signatures()
    except HubUnavailable:
        if problems:
            return problems  # told of already: a row that cannot be read
        raise
    problems += _journal(catalog, events)
    present = set(blobs.digests())
    for done, record in enumerate(records, start=1):
        problems += _blobs(record, present)
        if progress is not None:
            progress("checking", done, len(records))
    for name, number, signature in sorted(signatures):
        if signature not in present:
            text = f"{name}@{number}"
            what = f"signature {signature.hex[:16]}"
            problems.append(
                Problem(text, what, "BLOB_CORRUPT", f"a {what} of {text} is missing from the hub's storage")
            )
    return problems


def _journal(catalog: Catalog, events: list[Event]) -> Iterator[Problem]:
    """Where the journal is not what the catalog's events are."""
    recorded = 0
    try:
        for mine, told in zip(events, catalog.journal_events(), strict=False):
            recorded += 1
            if mine != told:
                yield Problem("journal", None, "JOURNAL_DAMAGED", f"event {mine.seq} is another in the journal")
                return
    except HubError as error:
        yield Problem("journal", None, "JOURNAL_DAMAGED", str(error))
        return
    if recorded < len(events):
        missing = len(events) - recorded
        yield Problem("journal", None, "JOURNAL_BEHIND", f"the last {missing} events are not in the journal yet")


def _blobs(record: Record, present: set[Digest]) -> Iterator[Problem]:
    try:
        if hashlib.sha256(record.manifest).hexdigest() != record.digest.hex:
            raise BlobCorrupt("the catalog's copy of the manifest is damaged")
        manifest = Manifest.parse(record.manifest)
    except BlobCorrupt as error:
        yield Problem(record.text, "manifest", error.reason, str(error))
        return
    needed = {"manifest": record.digest, **{name: entry.sha256 for name, entry in manifest.files.items()}}
    for name, digest in needed.items():
        if digest not in present:
            yield Problem(
                record.text, name, "BLOB_CORRUPT", f"{name} of {record.text} is missing from the hub's storage"
            )


def _catalog(text: str) -> Problem:
    return Problem("catalog", None, "CATALOG_DAMAGED", text)
