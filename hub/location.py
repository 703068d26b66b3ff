"""Opens a hub: the parts that a place (see `hub.place`) is made of, checked to be a hub this release reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import sqlalchemy as sa

from hub import catalog, format_mark, postgres, schema, sqlite
from hub.actor import current_user
from hub.blobs import BlobStore
from hub.blobs.local import LocalBlobStore
from hub.errors import HubNotFound, HubUnavailable, StorageUnreachable
from hub.journal import Journal
from hub.local_journal import LocalJournal
from hub.place import ENVIRONMENT, Place, default_url
from hub.transactions import writing

__all__ = ["ENVIRONMENT", "Place", "default_url"]


def no_step(name: str) -> None:
    """Do nothing at a step."""


def open_parts(url: str | None) -> tuple[BlobStore, catalog.Catalog]:
    """The storage and catalog of the hub at `url`, made where there is none; see `Hub.open`."""
    place = Place.parse(url)
    with _failures():
        only_read = not place.writable and format_mark.is_hub(place)
    return open_existing(url) if only_read else make(place)


def open_existing(url: str | None) -> tuple[BlobStore, catalog.Catalog]:
    """The parts of the hub at `url`, which is there; where it cannot be written, for reading.

    Raises HubNotFound, naming the place, where there is none.
    """
    place = Place.parse(url)
    with _failures():
        away: StorageUnreachable | None = None
        try:
            if not format_mark.is_hub(place):
                raise HubNotFound(f"there is no hub at {place.shown}; `hub push` makes it")
            format_mark.check(place)
        except StorageUnreachable as error:
            away = error
        return _open(place, no_step, away) if place.writable else _open_for_reading(place)


def open_local(root: Path, *, step: catalog.Step = no_step) -> tuple[BlobStore, catalog.Catalog]:
    """The parts of the hub in the directory `root`, made where there is none; see `make`."""
    return make(Place(root), step=step)


def make(place: Place, *, step: catalog.Step = no_step) -> tuple[BlobStore, catalog.Catalog]:
    """The parts of the hub at `place`, made where there is none; raises HubUnavailable.

    `step` is called before every step of a write, with the step's name; the crash tests stop there.
    """
    with _failures():
        away: StorageUnreachable | None = None
        try:
            format_mark.make(place)
            format_mark.check(place)
        except StorageUnreachable as error:
            away = error  # what is cached can be read, if only the catalog is there
        return _open(place, step, away)


def mend_mark(place: Place) -> None:
    """See `format_mark.mend`; raises HubUnavailable."""
    with _failures():
        format_mark.mend(place)


def make_anew(place: Place) -> tuple[BlobStore, catalog.Catalog]:
    """As `make`, but a catalog that is missing beside a journal is made, empty: for whoever fills it from there."""
    with _failures():
        engine = _engine(place)
        with writing(engine) as connection:
            schema.bring_up(connection)
        format_mark.write(place)
    blobs, journal = storage(place)
    return blobs, catalog.Catalog(engine, journal, actor=current_user())


def storage(place: Place, step: catalog.Step = no_step) -> tuple[BlobStore, Journal]:
    """The parts that are not the catalog."""
    if place.bucket is None:
        assert place.directory is not None
        return (
            LocalBlobStore(place.directory / "blobs", step=step),
            LocalJournal(place.directory / "journal", step=step),
        )
    # The S3 client is large; hubs without one do not load it.
    from hub.blobs import cached
    from hub.blobs.bucket import Bucket
    from hub.blobs.s3 import S3BlobStore
    from hub.s3_journal import S3Journal

    bucket = Bucket.parse(place.bucket)
    far, root = S3BlobStore(bucket, step=step), platformdirs.user_cache_path("loraplex") / "blobs"
    return cached.CachedBlobStore(far, root, max_bytes=cached.limit()), S3Journal(bucket, step=step)


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HubUnavailable(f"the hub cannot be opened: {os.strerror(error.errno or 0)}") from error
    except (sa.exc.DBAPIError, UnicodeDecodeError) as error:
        raise HubUnavailable(f"the hub's catalog cannot be used: {sqlite.cause(error)}") from error


def _open(place: Place, step: catalog.Step, away: StorageUnreachable | None) -> tuple[BlobStore, catalog.Catalog]:
    """The parts, with the tables brought up; `away`: why the bucket could not be asked whether it is a hub's."""
    blobs, journal = storage(place, step)
    file = place.catalog
    # Asked again after the journal: another process may just be making both.
    if file is not None and not file.exists() and journal.has(1) and not file.exists():
        raise _without_catalog()
    engine = _engine(place)
    entries = catalog.Catalog(engine, journal, actor=current_user(), step=step)
    try:
        with engine.connect() as connection:
            current = schema.revision(connection) == schema.HEAD
        if not current:
            if away is not None:
                raise away
            with writing(engine) as connection:
                if schema.revision(connection) is None and journal.has(1):
                    raise _without_catalog()
                schema.bring_up(connection)
            entries.settle()
        if away is None:
            format_mark.bring_up(place)
    except BaseException:
        engine.dispose()
        raise
    return blobs, entries


def _open_for_reading(place: Place) -> tuple[BlobStore, catalog.Catalog]:
    blobs, journal = storage(place)
    if place.database is not None:
        return blobs, catalog.Catalog(postgres.open_engine(place.database), journal, read_only=True)
    file = place.catalog
    if file is None or not file.exists():
        raise _without_catalog()
    return blobs, catalog.Catalog(sqlite.open_for_reading(file), journal, read_only=True)


def _engine(place: Place) -> sa.Engine:
    if place.database is not None:
        return postgres.open_engine(place.database)
    assert place.catalog is not None
    return sqlite.open_engine(place.catalog)


def _without_catalog() -> HubUnavailable:
    return HubUnavailable(
        "the hub has a journal and no catalog: open it by the URL its catalog is at (PostgreSQL?), or, where the "
        "catalog is lost, make it anew with `hub fsck --rebuild`"
    )
