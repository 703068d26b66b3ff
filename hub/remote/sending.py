"""An upload that runs beside the check of what it sends, and ends with it where that fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from hub.adapter_dir import AdapterFile
from hub.progress import Progress
from hub.remote.connection import Connection, Stop
from hub.remote.transfer import upload

_END_SECONDS: Final = 2.0  # how long an upload that was stopped is waited for; it may hang at a server that is silent


class Sending:
    """One push's upload; `begin` may be called from another thread. Leaving it by an error stops the upload."""

    def __init__(
        self, connection: Connection, directory: Path, ref: str, actor: str | None, progress: Progress | None
    ) -> None:
        self._connection, self._directory, self._ref, self._actor = connection, directory, ref, actor
        self._progress = progress
        self._checked = False
        self._total = 0
        self._stop = Stop()
        self._done: Future[None] = Future()
        self._thread: threading.Thread | None = None

    def begin(self, files: Sequence[AdapterFile]) -> None:
        """Send these files; once."""
        self._total = sum(file.bytes for file in files)
        self._thread = threading.Thread(target=self._run, args=(files,), name="loraplex-upload", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """All is checked: wait for the upload, with its progress from here on; raises what `upload` raises."""
        self._checked = True
        self._done.result()
        if self._progress is not None:
            self._progress("uploading", self._total, self._total)  # the upload may have been quicker than the check

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            if error is not None:
                self._stop.now()
            self._thread.join(_END_SECONDS if error is not None else None)

    def _run(self, files: Sequence[AdapterFile]) -> None:
        try:
            upload(self._connection, self._directory, files, self._ref, self._actor, self._told, self._stop)
        except BaseException as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(None)

    def _told(self, what: str, done: int, total: int) -> None:
        if self._checked and self._progress is not None:
            self._progress(what, done, total)
