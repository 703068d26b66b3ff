"""The journal as files: `<root>/<thousands>/<number>.json`, both of twelve digits."""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from hub.blobs.local import Step, no_step, storage_unavailable, sync_directory
from hub.errors import BlobCorrupt, HubUnavailable
from hub.journal import OTHER_STORY, Journal, decode

_NAME: Final = re.compile(r"([0-9]{12})\.json", re.ASCII)


class LocalJournal(Journal):
    """A journal under one directory of this machine, made at the first record."""

    def __init__(self, root: Path, *, step: Step = no_step) -> None:
        self._root = root
        self._step = step

    def put(self, batch: int, data: bytes) -> None:
        """Store a record; on return it survives a crash. See `Journal.put`."""
        final = self._path(batch)
        temporary = final.with_name(f".{batch}.{uuid.uuid4().hex}")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            self._step("journal:write")
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._step("journal:link")
            self._publish(batch, temporary, final, data)
            for directory in (final.parent, self._root, self._root.parent):
                sync_directory(directory)
        except OSError as error:
            raise storage_unavailable(error) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def has(self, batch: int) -> bool:
        """Whether the record is there."""
        return self._path(batch).is_file()

    def read(self) -> Iterator[tuple[int, bytes]]:
        """All records, by number, unchecked."""
        try:
            for path in sorted(self._root.glob("*/*")):
                if found := _NAME.fullmatch(path.name):
                    yield int(found[1]), path.read_bytes()
        except OSError as error:
            raise storage_unavailable(error) from error

    def _publish(self, batch: int, temporary: Path, final: Path, data: bytes) -> None:
        try:
            os.link(temporary, final)
        except FileExistsError:
            there = final.read_bytes()
            if there == data:
                return
            try:
                decode(batch, there)
            except BlobCorrupt:
                temporary.replace(final)  # damaged since it was written
                return
            raise HubUnavailable(OTHER_STORY) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            temporary.replace(final)  # a file system without hard links

    def _path(self, batch: int) -> Path:
        return self._root / f"{batch // 1000:012}" / f"{batch:012}.json"
