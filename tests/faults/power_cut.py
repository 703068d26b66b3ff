"""A disk that forgets what was not fsynced: what a power cut would have left, at any moment of a program's life.

While it records, every `os.fsync` notes what the file or the directory holds at that moment. `tree` then builds what
the strictest file system may leave behind: of a file the bytes of its last fsync (none, where there was none), of a
directory the names of its last fsync. Many file systems keep names without the bytes behind them, so there are two:

    names="synced"   a name is there where its directory was fsynced since
    names="early"    every name is there already, with the bytes of the file's last fsync

SQLite calls fsync by itself, out of sight: its files are taken as they are, which is what a process killed there leaves
and, with synchronous=FULL, what a power cut leaves of every commit that returned. The fault looked for is the other
one: that a commit is kept and something it speaks of is not.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class VolatileDisk:
    """Records fsyncs below `root`, whose own name counts as durable."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        self._monkeypatch = monkeypatch
        self._bytes: dict[int, bytes] = {}  # inode → what its last fsync kept
        self._names: dict[int, dict[str, int]] = {}  # a directory's inode → name → inode
        self._kept_open: dict[int, int] = {}  # so that no inode is used twice
        self._fsync = os.fsync

    @contextmanager
    def recording(self, before: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Note every fsync meanwhile; `before` is called before each of them."""

        def fsync(file: int) -> None:
            before()
            self._fsync(file)
            self._note(file)

        descriptor = os.open(self._root, os.O_RDONLY)
        self._note(descriptor)
        os.close(descriptor)
        with self._monkeypatch.context() as patched:
            patched.setattr(os, "fsync", fsync)
            try:
                yield
            finally:
                for kept in self._kept_open.values():
                    os.close(kept)

    def tree(self, target: Path, names: str) -> None:
        """What is left after a power cut now, as a directory of its own."""
        self._build(self._root, self._root.stat().st_ino, target, names)

    def _note(self, file: int) -> None:
        found = os.fstat(file)
        self._keep(found.st_ino, os.dup, file)
        if not stat.S_ISDIR(found.st_mode):
            self._bytes[found.st_ino] = Path(f"/proc/self/fd/{file}").read_bytes()
            return
        directory = Path(f"/proc/self/fd/{file}").readlink()
        self._names[found.st_ino] = {}
        for path in directory.iterdir():
            if not path.name.startswith("catalog.sqlite"):
                inode = path.stat().st_ino
                self._names[found.st_ino][path.name] = inode
                self._keep(inode, lambda path: os.open(path, os.O_RDONLY), path)
            else:
                self._names[found.st_ino][path.name] = -1

    def _keep(self, inode: int, opened: Callable[[Any], int], what: Any) -> None:
        if inode not in self._kept_open:
            self._kept_open[inode] = opened(what)

    def _build(self, live: Path, inode: int, target: Path, names: str) -> None:
        target.mkdir(parents=True)
        there = {path.name: path.stat().st_ino for path in live.iterdir()} if live.is_dir() else {}
        kept = there if names == "early" else self._names.get(inode, {})
        for name, child in kept.items():
            if name.startswith("catalog.sqlite"):
                if name in there and not name.endswith("-shm"):
                    shutil.copyfile(live / name, target / name)
                continue
            if child in self._names or (name in there and (live / name).is_dir()):
                self._build(live / name, child, target / name, names)
            else:
                (target / name).write_bytes(self._bytes.get(child, b""))
