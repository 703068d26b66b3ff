"""A disk on which the n-th system call that changes something fails, below one directory."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class FailingDisk:
    """Counts the calls below `root` that change it: opening to write, write, fsync, link, rename, mkdir.

    Call number `fail_at` (counted from 0) raises `code`; a write leaves half of its bytes first. With `lasting` every
    later one fails too, as on a disk that stays full. What cleans up, unlink, never fails and is not counted. SQLite
    writes without Python and is not covered here.
    """

    def __init__(self, root: Path, code: int, fail_at: int | None, *, lasting: bool = False) -> None:
        self.calls: list[str] = []
        self._root = str(root)
        self._code = code
        self._fail_at = fail_at
        self._lasting = lasting

    @contextmanager
    def mounted(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FailingDisk]:
        """The disk is this one meanwhile."""
        with monkeypatch.context() as patched:
            for name in ("link", "rename", "replace", "mkdir"):
                patched.setattr(os, name, self._two_paths(name, getattr(os, name)))
            patched.setattr(os, "fsync", self._fsync(os.fsync))
            patched.setattr(os, "open", self._os_open(os.open))
            patched.setattr(io, "open", self._io_open(io.open))
            yield self

    def _count(self, call: str) -> bool:
        """Whether this call fails."""
        number = len(self.calls)
        self.calls.append(call)
        return self._fail_at is not None and (number == self._fail_at or (self._lasting and number > self._fail_at))

    def _error(self) -> OSError:
        return OSError(self._code, os.strerror(self._code))

    def _below(self, path: Any) -> bool:
        return isinstance(path, (str, os.PathLike)) and str(path).startswith(self._root)

    def _of(self, file: int) -> bool:
        return str(Path(f"/proc/self/fd/{file}").readlink()).startswith(self._root)

    def _two_paths(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*paths: Any, **options: Any) -> Any:
            if any(map(self._below, paths)) and self._count(name):
                raise self._error()
            return real(*paths, **options)

        return call

    def _fsync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def fsync(file: int) -> None:
            if self._of(file) and self._count("fsync"):
                raise self._error()
            real(file)

        return fsync

    def _os_open(self, real: Callable[..., int]) -> Callable[..., int]:
        def opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR) and self._below(path) and self._count("open"):
                raise self._error()
            return real(path, flags, *rest, **options)

        return opened

    def _io_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            changes = any(letter in mode for letter in "wxa+")
            ours = changes and (self._of(file) if isinstance(file, int) else self._below(file))
            if ours and not isinstance(file, int) and self._count("open"):
                raise self._error()
            made = real(file, mode, *rest, **options)
            return _Writing(made, self) if ours else made

        return opened


class _Writing:
    """A file whose writes may fail."""

    def __init__(self, file: Any, disk: FailingDisk) -> None:
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        if self._disk._count("write"):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise self._disk._error()
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Writing:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
