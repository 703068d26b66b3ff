"""Marks on disk: `<root>/<tenant>/<day>.jsonl`, one line a mark, appended and never changed.

A tenant's directory is named by a digest, with what is harmless of the tenant's name in front: names come from callers.
Files are this user's alone. A mark that is stored survives a power cut; one that fails leaves no half line behind, or
else the next one begins a line of its own.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Final

from hub.blobs.local import sync_directory
from hub.byte_size import as_text
from hub.full_write import write_all
from server.errors import FeedbackDirectoryUnusable, FeedbackFull, FeedbackNotStored
from server.feedback.mark import Mark

log = logging.getLogger(__name__)

_DAY: Final = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2})\.jsonl", re.ASCII)
_NAME_CHARS: Final = 32


class FeedbackStore:
    """One server's marks. Use it from one thread at a time; other processes may share the root."""

    def __init__(
        self,
        root: Path,
        *,
        retention_seconds: float,
        max_tenant_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`retention_seconds`: how long a day's marks are kept after the day's end, in UTC."""
        self._root = root
        self._retention_seconds = retention_seconds
        self._max_tenant_bytes = max_tenant_bytes
        self._clock = clock

    def append(self, mark: Mark) -> None:
        """Store a mark. Raises `FeedbackFull`, and `FeedbackNotStored` where the disk fails."""
        line = mark.as_line()
        directory = self._root / tenant_directory(mark.tenant)
        try:
            if not directory.is_dir():
                directory.mkdir(mode=0o700, exist_ok=True)
                sync_directory(self._root)
            held = sum(path.stat().st_size for path in directory.iterdir())
            if held + len(line) > self._max_tenant_bytes:
                raise FeedbackFull(
                    f"marks of this tenant take {as_text(held)} of {as_text(self._max_tenant_bytes)}: there is no room "
                    f"for another {as_text(len(line))}"
                )
            if _append(directory / f"{mark.marked[:10]}.jsonl", line):
                sync_directory(directory)
        except OSError as error:
            what = os.strerror(error.errno) if error.errno else type(error).__name__
            raise FeedbackNotStored(f"the mark was not stored: {what}") from error

    def remove_old(self) -> int:
        """Remove the days whose retention is over, and tenants of whom nothing is left; how many days."""
        removed = 0
        for path, day in days(self._root):
            over = datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1)
            if self._clock() - over.timestamp() < self._retention_seconds:
                continue
            try:
                path.unlink(missing_ok=True)
                removed += 1
            except OSError as error:
                log.warning("feedback of %s is past its retention and cannot be removed: %s", day, error.strerror)
            with suppress(OSError):  # other days are left in it
                path.parent.rmdir()
        return removed


def prepare_directory(root: Path) -> None:
    """Make the directory for marks where it is not there; raises `FeedbackDirectoryUnusable` where it is no use."""
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise FeedbackDirectoryUnusable(f"cannot store feedback in {root}: {os.strerror(error.errno or 0)}") from error


def days(root: Path, tenant: str | None = None) -> list[tuple[Path, date]]:
    """The files of marks under `root`, of all tenants or of one, by day. Raises OSError."""
    if not root.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(root))
    found = []
    for path in root.glob(f"{'*' if tenant is None else tenant_directory(tenant)}/*.jsonl"):
        named = _DAY.fullmatch(path.name)
        with suppress(ValueError):  # 2026-99-99: none of ours
            if named is not None:
                found.append((path, date.fromisoformat(named[1])))
    return sorted(found, key=lambda pair: (pair[1], pair[0]))


def tenant_directory(tenant: str) -> str:
    """The name of a tenant's directory: no path, whatever the tenant is called, and no two tenants' alike."""
    harmless = re.sub(r"[^a-z0-9]+", "-", tenant.lower(), flags=re.ASCII).strip("-")[:_NAME_CHARS] or "tenant"
    return f"{harmless}-{hashlib.sha256(tenant.encode()).hexdigest()[:32]}"


def _append(path: Path, line: bytes) -> bool:
    """Add a line that survives a power cut, or nothing; True where it is the file's first. Raises OSError."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "r+b", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another server's line must not be cut off below
        size = os.fstat(file.fileno()).st_size
        try:
            write_all(file, (b"\n" if _is_torn(file, size) else b"") + line)
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise
    return size == 0


def _is_torn(file: BinaryIO, size: int) -> bool:
    """Whether the last line has no end, as a power cut may leave it."""
    return size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
