"""Names for what is written beside its place and renamed there when it is whole."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path


def beside(target: Path) -> Path:
    """A new hidden name in the target's directory, which is made; short enough however long the target's is."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
    return target.with_name(f".{target.name[:40]}.{uuid.uuid4().hex}")
