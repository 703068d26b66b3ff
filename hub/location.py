"""Where a hub lies, from a URL to its parts.

    file:///directory, or a path                        everything in one directory
    postgresql://user@host/database?blobs=/directory    the catalog in PostgreSQL, the rest in the directory

<directory>/FORMAT           "loraplex hub 2"
<directory>/catalog.sqlite   versions, aliases, events; not with PostgreSQL
<directory>/blobs/           files and manifests by SHA-256
<directory>/journal/         the events once more, to rebuild the catalog from
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import platformdirs
import sqlalchemy as sa

from hub import catalog, postgres, schema, sqlite
from hub.actor import current_user
from hub.blobs import BlobStore
from hub.blobs.local import LocalBlobStore
from hub.errors import HubNotFound, HubUnavailable
from hub.journal import Journal
from hub.local_journal import LocalJournal

ENVIRONMENT: Final = "LORAPLEX_HUB"
_FORMAT: Final = "loraplex hub 2\n"
_READ_FORMATS: Final = ("loraplex hub 1\n", _FORMAT)


def no_step(name: str) -> None:
    """Do nothing at a step."""


@dataclass(frozen=True)
class Place:
    """A hub's place, parsed from its URL."""

    directory: Path
    database: sa.URL | None = None  # the PostgreSQL catalog; None: SQLite in the directory

    @classmethod
    def parse(cls, url: str | None) -> Place:
        """The place that `url` names; None means LORAPLEX_HUB, else this user's data directory.

        Raises HubUnavailable.
        """
        text = url or os.environ.get(ENVIRONMENT) or default_url()
        scheme = text.partition("://")[0] if "://" in text else ""
        if scheme.partition("+")[0] not in ("postgresql", "postgres"):
            return cls(_directory(text))
        try:
            database = sa.make_url(text)
        except (sa.exc.ArgumentError, ValueError) as error:
            raise HubUnavailable("the hub's PostgreSQL URL cannot be read") from error
        blobs = database.query.get("blobs")
        if not isinstance(blobs, str):
            raise HubUnavailable(
                "a PostgreSQL hub says where its blobs are: postgresql://user@host/database?blobs=/directory"
            )
        return cls(_directory(blobs), database.difference_update_query(["blobs"]))

    @property
    def catalog(self) -> Path:
        """The SQLite catalog's file."""
        return self.directory / "catalog.sqlite"

    @property
    def shown(self) -> str:
        """The place for people; never a password."""
        if self.database is None:
            return str(self.directory)
        return f"{self.database.render_as_string()} with blobs in {self.directory}"


def open_parts(url: str | None) -> tuple[BlobStore, catalog.Catalog]:
    """The storage and catalog of the hub at `url`, made where there is none; see `Hub.open`."""
    return make(Place.parse(url))


def open_existing(url: str | None) -> tuple[BlobStore, catalog.Catalog]:
    """The parts of the hub at `url`, which is there; where it cannot be written, for reading.

    Raises HubNotFound, naming the place, where there is none.
    """
    place = Place.parse(url)
    try:
        if not (place.directory / "FORMAT").exists() and not place.catalog.exists():
            raise HubNotFound(f"there is no hub at {place.shown}; `hub push` makes it")
        _check_format(place.directory)
        if os.access(place.directory, os.W_OK) and (
            place.database is not None or not place.catalog.exists() or os.access(place.catalog, os.W_OK)
        ):
            return _open(place, no_step)
        return _open_for_reading(place)
    except OSError as error:
        raise HubUnavailable(f"the hub cannot be opened: {os.strerror(error.errno or 0)}") from error
    except sa.exc.DBAPIError as error:
        raise HubUnavailable(f"the hub's catalog cannot be used: {_first_line(error)}") from error


def open_local(root: Path, *, step: catalog.Step = no_step) -> tuple[BlobStore, catalog.Catalog]:
    """The parts of the hub in the directory `root`, made where there is none; see `make`."""
    return make(Place(root), step=step)


def make(place: Place, *, step: catalog.Step = no_step) -> tuple[BlobStore, catalog.Catalog]:
    """The parts of the hub at `place`, made where there is none; raises HubUnavailable.

    `step` is called before every step of a write, with the step's name; the crash tests stop there.
    """
    try:
        place.directory.mkdir(parents=True, exist_ok=True)
        # Another process may just be writing the file.
        if all(path.name.startswith(".FORMAT.") for path in place.directory.iterdir()):
            _write_format(place.directory)
        _check_format(place.directory)
        return _open(place, step)
    except OSError as error:
        raise HubUnavailable(f"the hub cannot be opened: {os.strerror(error.errno or 0)}") from error
    except sa.exc.DBAPIError as error:
        raise HubUnavailable(f"the hub's catalog cannot be used: {_first_line(error)}") from error


def make_anew(place: Place) -> tuple[BlobStore, catalog.Catalog]:
    """As `make`, but a catalog that is missing beside a journal is made, empty: for whoever fills it from there."""
    try:
        engine = sqlite.open_engine(place.catalog) if place.database is None else postgres.open_engine(place.database)
        with engine.execution_options(**{sqlite.WRITING: True}).begin() as connection:
            schema.bring_up(connection)
        _write_format(place.directory)
    except OSError as error:
        raise HubUnavailable(f"the hub cannot be opened: {os.strerror(error.errno or 0)}") from error
    except sa.exc.DBAPIError as error:
        raise HubUnavailable(f"the hub's catalog cannot be used: {_first_line(error)}") from error
    blobs, journal = storage(place)
    return blobs, catalog.Catalog(engine, journal, actor=current_user())


def storage(place: Place, step: catalog.Step = no_step) -> tuple[BlobStore, Journal]:
    """The parts that are not the catalog."""
    return LocalBlobStore(place.directory / "blobs", step=step), LocalJournal(place.directory / "journal", step=step)


def default_url() -> str:
    """This user's hub: file:// and the XDG data directory."""
    return (platformdirs.user_data_path("loraplex") / "hub").as_uri()


def _open(place: Place, step: catalog.Step) -> tuple[BlobStore, catalog.Catalog]:
    blobs, journal = storage(place, step)
    if place.database is None:
        # Asked again after the journal: another process may just be making both.
        if not place.catalog.exists() and journal.has(1) and not place.catalog.exists():
            raise _without_catalog()
        engine = sqlite.open_engine(place.catalog)
    else:
        engine = postgres.open_engine(place.database)
    entries = catalog.Catalog(engine, journal, actor=current_user(), step=step)
    try:
        with engine.connect() as connection:
            current = schema.revision(connection) == schema.HEAD
        if not current:
            with engine.execution_options(**{sqlite.WRITING: True}).begin() as connection:
                if schema.revision(connection) is None and journal.has(1):
                    raise _without_catalog()
                schema.bring_up(connection)
            entries.settle()
        if _format(place.directory) != _FORMAT:
            _write_format(place.directory)
    except BaseException:
        engine.dispose()
        raise
    return blobs, entries


def _open_for_reading(place: Place) -> tuple[BlobStore, catalog.Catalog]:
    blobs, journal = storage(place)
    if place.database is not None:
        return blobs, catalog.Catalog(postgres.open_engine(place.database), journal, read_only=True)
    if not place.catalog.exists():
        raise _without_catalog()
    return blobs, catalog.Catalog(sqlite.open_for_reading(place.catalog), journal, read_only=True)


def _without_catalog() -> HubUnavailable:
    return HubUnavailable(
        "the hub has a journal and no catalog: open it by the URL its catalog is at (PostgreSQL?), or, where the "
        "catalog is lost, make it anew with `hub fsck --rebuild`"
    )


def _directory(url: str) -> Path:
    if "://" not in url:
        return Path(url).expanduser().absolute()
    parts = urlsplit(url)
    if parts.scheme != "file":
        raise HubUnavailable(
            f"this release cannot open {parts.scheme}:// hubs; give file:///directory, a path, or "
            "postgresql://user@host/database?blobs=/directory"
        )
    if parts.netloc not in ("", "localhost"):
        raise HubUnavailable(f"{url}: a file URL has three slashes, file:///directory")
    if not parts.path.strip("/"):
        raise HubUnavailable(f"{url} names no directory")
    return Path(unquote(parts.path))


def _check_format(directory: Path) -> None:
    found = _format(directory)
    if found is None:
        if not (directory / "catalog.sqlite").exists() and not (directory / "blobs").exists():
            raise HubUnavailable("the directory holds other things and no hub; give an empty or a new one")
    elif found not in _READ_FORMATS:
        raise HubUnavailable(f"the hub's format is {found.strip()[:40]!a}, this release reads {_FORMAT.strip()!r}")


def _format(directory: Path) -> str | None:
    try:
        return (directory / "FORMAT").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _write_format(directory: Path) -> None:
    temporary = directory / f".FORMAT.{uuid.uuid4().hex}"
    temporary.write_text(_FORMAT)
    temporary.replace(directory / "FORMAT")


def _first_line(error: sa.exc.DBAPIError) -> str:
    return str(error.orig or type(error).__name__).partition("\n")[0]
