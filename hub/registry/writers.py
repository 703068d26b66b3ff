"""Whether a file may still change under its reader."""

from __future__ import annotations

import fcntl
import signal
from pathlib import Path


def nobody_writes(path: Path) -> bool:
    """Whether no process at all has the file open for writing, so that only who opens it anew can change it.

    The kernel gives a read lease to nobody else; False also where it gives none at all, as on a network file system.
    Raises OSError where the file cannot be opened.
    """
    with path.open("rb") as file:
        try:
            # Who opens it for writing meanwhile is told of by a signal, which otherwise ends the process.
            fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except (OSError, AttributeError):  # no such lease here, or no Linux
            return False
    return True
