"""Where the records of evaluations lie: under a version's digest, each whole under a name of its own.

A hub with a directory keeps them there, whatever its blobs do; one without keeps them as objects, see
`hub.s3_evaluations`.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path

from hub.errors import HubUnavailable
from hub.refs import Digest


class Records(ABC):
    """Records by version and name. Names sort as they were written; all raise HubUnavailable where it fails."""

    @abstractmethod
    def write(self, digest: Digest, name: str, data: bytes) -> None:
        """Keep a record, whole or not at all."""

    @abstractmethod
    def names(self, digest: Digest) -> list[str]:
        """The names of a version's records, in order."""

    @abstractmethod
    def read(self, digest: Digest) -> list[tuple[str, bytes]]:
        """A version's records with their names, in order, unchecked; without those that are removed meanwhile."""

    @abstractmethod
    def digests(self) -> list[Digest]:
        """Of the versions that have records, in order."""

    @abstractmethod
    def size(self, digest: Digest) -> int:
        """Bytes that `remove` would give back."""

    @abstractmethod
    def remove(self, digest: Digest) -> None:
        """Delete all of a version's records; nothing happens where there are none."""


class DirectoryRecords(Records):
    """Records as files: `<root>/<64 digits>/<name>`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def write(self, digest: Digest, name: str, data: bytes) -> None:
        """Keep a record, whole or not at all."""
        directory = self._root / digest.hex
        try:
            directory.mkdir(parents=True, exist_ok=True)
            aside = directory / f".{name}"
            with aside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(directory / name)
        except OSError as error:
            raise _failed("the evaluation cannot be kept", error) from error

    def names(self, digest: Digest) -> list[str]:
        """The names of a version's records, in order."""
        try:
            return sorted(file.name for file in (self._root / digest.hex).glob("[0-9]*.json"))
        except OSError as error:
            raise _failed("the evaluations cannot be read", error) from error

    def read(self, digest: Digest) -> list[tuple[str, bytes]]:
        """A version's records with their names, in order, unchecked."""
        found = []
        for name in self.names(digest):
            try:
                found.append((name, (self._root / digest.hex / name).read_bytes()))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise _failed("the evaluations cannot be read", error) from error
        return found

    def digests(self) -> list[Digest]:
        """Of the versions that have records, in order."""
        try:
            names = sorted(entry.name for entry in self._root.glob("[0-9a-f]*"))
        except OSError as error:
            raise _failed("the evaluations cannot be read", error) from error
        return [Digest.of_hex(name) for name in names if len(name) == 64]

    def size(self, digest: Digest) -> int:
        """Bytes of its files, half-written ones too."""
        try:
            return sum(file.stat().st_size for file in (self._root / digest.hex).iterdir())
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise _failed("the evaluations cannot be swept", error) from error

    def remove(self, digest: Digest) -> None:
        """Delete all of a version's records."""
        try:
            shutil.rmtree(self._root / digest.hex)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _failed("the evaluations cannot be swept", error) from error


def _failed(what: str, error: OSError) -> HubUnavailable:
    return HubUnavailable(f"{what}: {os.strerror(error.errno or 0)}")
