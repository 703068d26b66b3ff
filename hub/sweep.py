"""Gives back what nothing needs: versions removed long ago, blobs no version names, leavings of pushes that died,
scores of versions that are forgotten.

Safe beside pushes from other processes, without clocks: a blob is deleted while holding the catalog's write lock, after
asking there whether a version names it; and a push enters its version while holding the same lock, after asking whether
its blobs are still there, and stores them again if not. The grace period only spares running pushes that second round.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from hub.blobs import BlobStore
from hub.catalog import Catalog
from hub.catalog_writer import stamp
from hub.errors import HubUnavailable
from hub.evaluations import Evaluations
from hub.refs import Digest
from hub.versions import Swept

RETENTION_SECONDS: Final = 7 * 24 * 3600.0  # how long a removed version can be restored
GRACE_SECONDS: Final = 3600.0  # how old a blob or a leftover must be to be taken
_TOGETHER: Final = 200  # blobs deleted under one lock


def collect(
    blobs: BlobStore,
    catalog: Catalog,
    evaluations: Evaluations | None,
    retention_seconds: float,
    grace_seconds: float,
    *,
    dry_run: bool,
) -> Swept:
    """Sweep once; with `dry_run` change nothing. Raises HubUnavailable, also where the catalog is damaged."""
    if catalog.behind_journal():
        raise HubUnavailable(
            "the journal knows of writes that the catalog lacks, so nothing is swept: run `hub fsck --rebuild`"
        )
    if wrong := catalog.check():
        raise HubUnavailable(
            f"the catalog is damaged, so nothing is swept: {wrong[0]}; `hub fsck` tells all, `hub fsck --rebuild` mends"
        )
    now = time.time()
    leaving = catalog.expired(stamp(now - retention_seconds))
    if not dry_run and leaving:
        leaving = catalog.purge(leaving)
    count, size = 0, 0
    for old in _batches(blobs, now - grace_seconds):
        gone = catalog.unreferenced(list(old), leaving) if dry_run else catalog.sweep(list(old), blobs.delete)
        count += len(gone)
        size += sum(old[digest] for digest in gone)
    leftovers = [left for left in blobs.unfinished() if left.modified <= now - grace_seconds]
    if not dry_run:
        for left in leftovers:
            blobs.discard(left)
    if evaluations is not None and (recorded := evaluations.digests()):
        for digest in catalog.unreferenced(recorded, leaving):
            size += evaluations.discard(digest, dry_run=dry_run)
    return Swept(
        tuple(record.text for record in leaving), count, len(leftovers), size + sum(left.bytes for left in leftovers)
    )


def _batches(blobs: BlobStore, before: float) -> Iterator[dict[Digest, int]]:
    """Blobs that were last written up to `before`, with their sizes, some at a time."""
    batch: dict[Digest, int] = {}
    for digest, info in blobs.infos():
        if info.modified <= before:
            batch[digest] = info.bytes
        if len(batch) == _TOGETHER:
            yield batch
            batch = {}
    if batch:
        yield batch
