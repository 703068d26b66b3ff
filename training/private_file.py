"""A new file for its owner's eyes alone."""

from __future__ import annotations

import os
from pathlib import Path

from training.errors import OutputExists, OutputUnwritable


def write_private(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent; raises `OutputExists`, `OutputUnwritable`."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise OutputExists(f"{path} is there already; write to a new file") from error
    except OSError as error:
        raise OutputUnwritable(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputUnwritable(f"cannot write {path}: {error.strerror}") from error
