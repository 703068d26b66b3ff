"""Where a hub lies, from a URL to its parts. Today: a directory of this machine.

<directory>/FORMAT           "loraplex hub 1"
<directory>/catalog.sqlite   versions, aliases, events
<directory>/blobs/           files and manifests by SHA-256
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import platformdirs

from hub import catalog, tables
from hub.blobs import BlobStore
from hub.blobs.local import LocalBlobStore
from hub.errors import HubUnavailable
from hub.sqlite import open_engine

ENVIRONMENT: Final = "LORAPLEX_HUB"
_FORMAT: Final = "loraplex hub 1\n"


def open_parts(url: str | None) -> tuple[BlobStore, catalog.Catalog]:
    """The storage and catalog of the hub at `url`, made where there is none; see `Hub.open`."""
    return open_local(_directory(url or os.environ.get(ENVIRONMENT) or default_url()))


def open_local(root: Path, *, step: catalog.Step = lambda name: None) -> tuple[BlobStore, catalog.Catalog]:
    """The parts of the hub in the directory `root`, made where there is none; raises HubUnavailable.

    `step` is called before every step of a write, with the step's name; the crash tests stop there.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _check_format(root / "FORMAT", empty=not any(root.iterdir()))
    except OSError as error:
        raise HubUnavailable(f"the hub cannot be opened: {os.strerror(error.errno or 0)}") from error
    blobs = LocalBlobStore(root / "blobs", step=step)
    return blobs, catalog.Catalog(open_engine(root / "catalog.sqlite", tables.metadata), step=step)


def default_url() -> str:
    """This user's hub: file:// and the XDG data directory."""
    return (platformdirs.user_data_path("loraplex") / "hub").as_uri()


def _directory(url: str) -> Path:
    if "://" not in url:
        return Path(url).expanduser().absolute()
    parts = urlsplit(url)
    if parts.scheme != "file":
        raise HubUnavailable(f"this release cannot open {parts.scheme}:// hubs; give file:///directory or a path")
    if parts.netloc not in ("", "localhost"):
        raise HubUnavailable(f"{url}: a file URL has three slashes, file:///directory")
    if not parts.path.strip("/"):
        raise HubUnavailable(f"{url} names no directory")
    return Path(unquote(parts.path))


def _check_format(path: Path, *, empty: bool) -> None:
    try:
        found = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if not empty and not (path.parent / "catalog.sqlite").exists() and not (path.parent / "blobs").exists():
            raise HubUnavailable("the directory holds other things and no hub; give an empty or a new one") from None
        path.write_text(_FORMAT)
        return
    # A concurrent first opening may have written only part of the line.
    if not _FORMAT.startswith(found):
        raise HubUnavailable(f"the hub's format is {found.strip()[:40]!a}, this release reads {_FORMAT.strip()!r}")
