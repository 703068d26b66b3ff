"""A directory held by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_TRIES = 10  # to open a lock that its holder removes at the same time


@contextmanager
def held(directory: Path, taken: Exception) -> Iterator[None]:
    """Hold `directory`, which is made where it is not there; raises `taken` where another process holds it.

    The kernel lets go of it whatever becomes of the process. A directory into which nothing came is removed again.
    """
    path = directory / "lock"
    with _locked(path, taken) as file:
        try:
            yield
        finally:
            if _lies_at(file, path):
                path.unlink()
            with suppress(OSError):  # there is more in it
                directory.rmdir()


def _locked(path: Path, taken: Exception) -> IO[str]:
    for _ in range(_TRIES):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:  # its directory was removed just now
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise taken from error
        if _lies_at(file, path):
            return file
        file.close()  # its holder removed it after it was opened here: nobody else would see it
    raise taken


def _lies_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
