"""The mark by which a hub is known: the text "loraplex hub 2" in FORMAT, in its directory or at its bucket's prefix."""

from __future__ import annotations

import os
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Final

from hub.blobs.local import sync_directory
from hub.errors import HubTooNew, HubUnavailable
from hub.place import Place

_FORMAT: Final = "loraplex hub 2\n"
_READ_FORMATS: Final = ("loraplex hub 1\n", _FORMAT)
_MARK: Final = re.compile(r"loraplex hub ([1-9][0-9]{0,8})\n?", re.ASCII)
_OURS: Final = (".FORMAT.", ".BLOBS.", "BLOBS")  # what a process that is just making the hub may have written first


def is_hub(place: Place) -> bool:
    """Whether there is a hub at all; may raise OSError, HubUnavailable."""
    if place.directory is None:
        return _read(place) is not None
    return (place.directory / "FORMAT").exists() or (place.catalog is not None and place.catalog.exists())


def make(place: Place) -> None:
    """Mark a place that is empty; may raise OSError, HubUnavailable."""
    directory = place.directory
    if directory is None:
        if _read(place) is None:
            _write_bucket(place)
        return
    _make_directory(directory)
    # Another process may just be writing the files.
    if all(path.name.startswith(_OURS) for path in directory.iterdir()):
        write(place)


def write(place: Place) -> None:
    """Mark a place, whatever is there; may raise OSError, HubUnavailable."""
    if place.bucket is not None:
        _write_bucket(place)  # first: where the bucket cannot be used, nothing is made here
        if place.directory is not None:
            _write_once(place.directory, "BLOBS", place.bucket + "\n")
            if Place.parse(str(place.directory)).bucket != place.bucket:
                raise HubUnavailable(f"somebody else just made the hub in {place.directory} with other blobs")
    if place.directory is not None:
        temporary = place.directory / f".FORMAT.{uuid.uuid4().hex}"
        _write_through(temporary, _FORMAT)
        temporary.replace(place.directory / "FORMAT")
        sync_directory(place.directory)


def bring_up(place: Place) -> None:
    """Write today's mark over an older one; may raise OSError, HubUnavailable."""
    if _read(place) != _FORMAT:
        write(place)


def mend(place: Place) -> None:
    """Write the mark anew where what is there is none; may raise OSError, HubUnavailable.

    Raises HubTooNew where it is that of a newer release.
    """
    found = _read(place)
    if found is None or found in _READ_FORMATS:
        return
    if _is_newer(found):
        check(place)
    write(place)


def check(place: Place) -> None:
    """Raise HubUnavailable where the place is no hub, HubTooNew where it is one of a format of a newer release."""
    found = _read(place)
    if found is None:
        directory = place.directory
        if directory is None or not ((directory / "catalog.sqlite").exists() or (directory / "blobs").exists()):
            raise HubUnavailable("the directory holds other things and no hub; give an empty or a new one")
    elif found not in _READ_FORMATS:
        said = f"the hub's format is {found.strip()[:40]!a}, this release reads {_FORMAT.strip()!r}"
        if _is_newer(found):
            raise HubTooNew(f"{said}: use a newer one")
        raise HubUnavailable(f"{said}: its FORMAT is damaged, `hub fsck --rebuild` writes it anew")


def _is_newer(found: str) -> bool:
    mark, ours = _MARK.fullmatch(found), _MARK.fullmatch(_FORMAT)
    return mark is not None and ours is not None and int(mark[1]) > int(ours[1])


def _read(place: Place) -> str | None:
    if place.directory is None:
        return _read_bucket(place)
    try:
        return (place.directory / "FORMAT").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _read_bucket(place: Place) -> str | None:
    import obstore

    from hub.blobs.bucket import Bucket, no_bucket, reasons

    bucket = Bucket.parse(place.bucket or "")
    with reasons(bucket):
        try:
            found = bytes(obstore.get(bucket.connect(), "FORMAT").bytes())
        except FileNotFoundError as error:
            if no_bucket(error):
                raise
            return None
    return found.decode("utf-8", errors="replace")


def _write_bucket(place: Place) -> None:
    import obstore

    from hub.blobs.bucket import Bucket, reasons

    bucket = Bucket.parse(place.bucket or "")
    with reasons(bucket):
        obstore.put(bucket.connect(), "FORMAT", _FORMAT.encode(), use_multipart=False)


def _write_once(directory: Path, name: str, text: str) -> None:
    """Write a small file that nobody ever writes again."""
    temporary = directory / f".{name}.{uuid.uuid4().hex}"
    try:
        _write_through(temporary, text)
        with suppress(FileExistsError):
            os.link(temporary, directory / name)
        sync_directory(directory)
    finally:
        temporary.unlink(missing_ok=True)


def _write_through(path: Path, text: str) -> None:
    """A new file whose bytes survive a power cut."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _make_directory(directory: Path) -> None:
    """A directory whose name, and its parents', survive a power cut."""
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        with suppress(PermissionError):  # written to and not read: a drop box
            sync_directory(each.parent)
