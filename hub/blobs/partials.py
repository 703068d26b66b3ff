"""Downloads under way, each in a file of its own, so that several at once are right also where locks do nothing.

    <directory>/<64 hex digits>.<32 more>     being written, by one process alone, or left by one that was killed
    <directory>/<64 hex digits>               cut short, and closed: whoever renames it first goes on with it

No file ever has two writers. The beginning that a killed process left is copied, never written on: nothing but a lock
could tell that it is dead. Anyone may remove any of the names; who has the file open goes on with it.
"""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final

from hub.refs import Digest

_DEAD_SECONDS: Final = 600.0  # without a write; where it lives after all, only the name of its file is lost


class Partials:
    """The downloads of one cache; safe to use from several threads and processes. Methods raise OSError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def begin(self, digest: Digest) -> Partial:
        """A new file, unbuffered, with the longest beginning in it that others left or are at; perhaps none.

        What is in it is not checked.
        """
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept = self._directory / digest.hex
        path = self._directory / f"{digest.hex}.{uuid.uuid4().hex}"
        try:
            kept.rename(path)
            file = _open(path, 0)
        except FileNotFoundError:
            file = _open(path, os.O_CREAT)
            self._copy_beginning(digest, path, file)
        return Partial(path, kept, file)

    def remove(self, digest: Digest) -> None:
        """Remove what there is of this download: it came to its end somewhere, or never can."""
        for path in self._directory.glob(f"{digest.hex}*"):
            path.unlink(missing_ok=True)

    def _copy_beginning(self, digest: Digest, path: Path, file: FileIO) -> None:
        before = os.fstat(file.fileno()).st_mtime - _DEAD_SECONDS  # by the file system's own clock
        others = []
        for other in self._directory.glob(f"{digest.hex}.*"):
            with suppress(FileNotFoundError):
                found = other.stat()
                if other != path:
                    others.append((found.st_size, found.st_mtime, other))
        try:
            if others and max(others)[0]:
                with max(others)[2].open("rb") as source:
                    shutil.copyfileobj(source, file, 1024 * 1024)
        except OSError:  # it is gone, or cannot be read, or does not fit
            file.seek(0)
            file.truncate()
        for _, modified, other in others:
            if modified < before:
                other.unlink(missing_ok=True)


@dataclass(frozen=True)
class Partial:
    """One download: the file to write, and what becomes of it."""

    path: Path
    kept: Path  # where it goes when it is cut short
    file: FileIO

    def publish(self, target: Path) -> None:
        """Move the file, which is whole, to `target`; it stays open. Nothing happens where its name was removed."""
        with suppress(FileNotFoundError):
            self.path.replace(target)

    def keep(self) -> None:
        """Close the file and leave it for the next who wants these bytes, unless there is a longer one."""
        size = os.fstat(self.file.fileno()).st_size
        self.file.close()
        with suppress(FileNotFoundError):
            if size > (self.kept.stat().st_size if self.kept.exists() else 0):
                self.path.replace(self.kept)
            else:
                self.path.unlink()


def _open(path: Path, flags: int) -> FileIO:
    return os.fdopen(os.open(path, os.O_RDWR | flags, 0o600), "r+b", buffering=0)
