"""Where a hub lies, from a URL to its parts.

    file:///directory, or a path                              everything in one directory
    file:///directory?blobs=s3://bucket/prefix                the catalog in the directory, the rest in the bucket
    postgresql://user@host/database?blobs=/directory          the catalog in PostgreSQL, the rest in the directory
    postgresql://user@host/database?blobs=s3://bucket/prefix  nothing on this machine but a cache

<directory>/FORMAT           "loraplex hub 2"; with PostgreSQL and S3 it is <prefix>/FORMAT
<directory>/BLOBS            the s3:// URL, where the blobs and the journal are there: the directory alone names the hub
<directory>/catalog.sqlite   versions, aliases, events; not with PostgreSQL
<directory>/blobs/           files and manifests by SHA-256
<directory>/journal/         the events once more, to rebuild the catalog from
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

import platformdirs
import sqlalchemy as sa

from hub.errors import HubUnavailable

ENVIRONMENT: Final = "LORAPLEX_HUB"


def named(url: str | None) -> str:
    """`url`, else LORAPLEX_HUB, else empty: the default directory."""
    return url or os.environ.get(ENVIRONMENT) or ""


@dataclass(frozen=True)
class Place:
    """A hub's place, parsed from its URL."""

    directory: Path | None  # None: nothing on this machine
    database: sa.URL | None = None  # the PostgreSQL catalog; None: SQLite in the directory
    bucket: str | None = None  # the s3:// URL of blobs and journal; None: in the directory

    @classmethod
    def parse(cls, url: str | None) -> Place:
        """The place that `url` names; None means LORAPLEX_HUB, else this user's data directory.

        Raises HubUnavailable.
        """
        text = named(url) or default_url()
        scheme = text.partition("://")[0] if "://" in text else ""
        if scheme.partition("+")[0] in ("postgresql", "postgres"):
            return cls._with_postgres(text)
        directory, bucket = _directory(text)
        marked = _is_there(directory / "FORMAT")  # asked first: whoever makes a hub writes BLOBS before FORMAT
        recorded = _recorded_bucket(directory)
        if bucket is not None and bucket != recorded and (recorded or marked):
            raise HubUnavailable(
                f"the hub in {directory} keeps its blobs {f'at {recorded}' if recorded else 'in its directory'}; "
                "open it by the directory alone"
            )
        return cls(directory, None, bucket or recorded)

    @classmethod
    def _with_postgres(cls, text: str) -> Place:
        try:
            database = sa.make_url(text)
        except (sa.exc.ArgumentError, ValueError) as error:
            raise HubUnavailable("the hub's PostgreSQL URL cannot be read") from error
        blobs = database.query.get("blobs")
        if not isinstance(blobs, str):
            raise HubUnavailable(
                "a PostgreSQL hub says where its blobs are: postgresql://user@host/database?blobs=/directory or "
                "?blobs=s3://bucket/prefix"
            )
        database = database.difference_update_query(["blobs"])
        if blobs.startswith("s3://"):
            return cls(None, database, _bucket_url(blobs))
        directory, bucket = _directory(blobs)
        if bucket is not None or _recorded_bucket(directory) is not None:
            raise HubUnavailable(f"the hub in {directory} keeps its blobs elsewhere and its catalog there")
        return cls(directory, database)

    @property
    def catalog(self) -> Path | None:
        """The SQLite catalog's file; None with PostgreSQL."""
        return self.directory / "catalog.sqlite" if self.directory is not None and self.database is None else None

    @property
    def shown(self) -> str:
        """The place for people; never a password."""
        blobs = self.bucket or str(self.directory)
        if self.database is not None:
            return f"{self.database.render_as_string()} with blobs in {blobs}"
        return str(self.directory) + (f" with blobs in {blobs}" if self.bucket else "")

    @property
    def writable(self) -> bool:
        """Whether this user may write what is on this machine."""
        if self.directory is None:
            return True
        if not os.access(self.directory, os.W_OK):
            return False
        return self.catalog is None or not self.catalog.exists() or os.access(self.catalog, os.W_OK)


def default_url() -> str:
    """This user's hub: file:// and the XDG data directory."""
    return (platformdirs.user_data_path("loraplex") / "hub").as_uri()


def _directory(url: str) -> tuple[Path, str | None]:
    """The directory of a path or file:// URL, and the s3:// URL of its blobs, if it names one."""
    if "://" not in url:
        return Path(url).expanduser().absolute(), None
    parts = urlsplit(url)
    if parts.scheme == "s3":
        raise HubUnavailable(
            "a bucket holds no catalog; give file:///directory?blobs=s3://bucket/prefix or "
            "postgresql://user@host/database?blobs=s3://bucket/prefix"
        )
    if parts.scheme in ("grpc", "grpcs"):
        raise HubUnavailable(
            f"{parts.scheme}:// is the address of a server, and this is done where its hub lies; give "
            "file:///directory, a path, or postgresql://user@host/database?blobs=/directory"
        )
    if parts.scheme != "file":
        raise HubUnavailable(
            f"this release cannot open {parts.scheme}:// hubs; give file:///directory, a path, or "
            "postgresql://user@host/database?blobs=/directory"
        )
    if parts.netloc not in ("", "localhost"):
        raise HubUnavailable(f"{url}: a file URL has three slashes, file:///directory")
    if parts.fragment:
        raise HubUnavailable(f"{url}: a file URL has no part after #; a # in a directory's name is written %23")
    if not parts.path.strip("/"):
        raise HubUnavailable(f"{url} names no directory")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    blobs = options.pop("blobs", None)
    if options:
        raise HubUnavailable(f"a hub's file URL has no parameter {min(options)[:40]!a}, only blobs=s3://bucket/prefix")
    return Path(unquote(parts.path)), None if blobs is None else _bucket_url(blobs)


def _bucket_url(text: str) -> str:
    """The URL of a bucket in its one form; raises HubUnavailable."""
    from hub.blobs.bucket import Bucket  # loads the S3 client, which few hubs need

    return Bucket.parse(text).url


def _recorded_bucket(directory: Path) -> str | None:
    """The URL in the directory's BLOBS file."""
    try:
        return _bucket_url((directory / "BLOBS").read_text(encoding="utf-8", errors="replace").strip())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _closed(error) from error


def _is_there(file: Path) -> bool:
    try:
        return file.exists()
    except OSError as error:
        raise _closed(error) from error


def _closed(error: OSError) -> HubUnavailable:
    return HubUnavailable(f"the hub cannot be opened: {os.strerror(error.errno or 0)}")
