"""Starts bringing a file to the disk while it is still being written, so that its fsync has less to wait for.

A hint, which promises nothing: what has to survive a power cut is fsynced all the same.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Final

STEP_BYTES: Final = 4 * 1024 * 1024
_WRITE: Final = 2  # SYNC_FILE_RANGE_WRITE: begin to write what is dirty and wait for nothing


class WriteBack:
    """Of one file, written from its beginning or from `done` on."""

    def __init__(self, descriptor: int, done: int = 0) -> None:
        self._descriptor, self._begun = descriptor, done

    def wrote(self, end: int) -> None:
        """The file's bytes up to `end` are written."""
        if end - self._begun >= STEP_BYTES:
            if _sync_file_range is not None:
                _sync_file_range(self._descriptor, self._begun, end - self._begun, _WRITE)
            self._begun = end


def _found() -> Any:
    """The system call; None where the system has none."""
    if sys.platform != "linux":
        return None
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


_sync_file_range: Final = _found()
