"""What is written beside its place and renamed there when it is whole."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from hub import model_dir
from hub.adapter_dir import CONFIG_FILE
from hub.errors import TargetNotEmpty

# Nothing can be put in the place of a mounted volume, or of a directory in one that others own.
_STAYS: Final = frozenset({errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS})
_LOADED_FIRST: Final = (CONFIG_FILE, model_dir.CONFIG_FILE)


def beside(target: Path) -> Path:
    """A new hidden name in the target's directory, which is made; short enough however long the target's is."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error
    return target.with_name(f".{target.name[:40]}.{uuid.uuid4().hex}")


def held(directory: Path) -> set[str]:
    """What is in a directory; a new volume's own lost+found is nothing."""
    return {entry.name for entry in directory.iterdir()} - ({"lost+found"} if directory.is_mount() else set())


def write_directory(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory that becomes `target`, an absolute path where nothing is or an empty directory.

    An empty directory that nothing can take the place of (a volume's, or the one the user is in) gets what was written
    one after the other when all is there, the config that loaders look for last; `write` may be called again for that.

    Raises TargetNotEmpty, OSError and what `write` raises; then `target` is as it was before.
    """
    if target.is_dir() and (target.is_mount() or target.samefile(os.curdir)):
        _fill(target, write)
        return
    try:
        _replace(target, write)
    except OSError as error:
        if error.errno not in _STAYS or not target.is_dir():
            raise
        _fill(target, write)


def _replace(target: Path, write: Callable[[Path], None]) -> None:
    temporary = beside(target)
    try:
        temporary.mkdir()
        write(temporary)
        try:
            temporary.rename(target)  # replaces an empty directory, nothing else
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise _filled(target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(target: Path, write: Callable[[Path], None]) -> None:
    temporary = target / f".{uuid.uuid4().hex}"
    moved: list[str] = []
    try:
        temporary.mkdir()
        write(temporary)
        if held(target) != {temporary.name}:
            raise _filled(target)
        for name in sorted((path.name for path in temporary.iterdir()), key=lambda name: (name in _LOADED_FIRST, name)):
            moved.append(name)
            (temporary / name).rename(target / name)
        moved.clear()
    finally:
        for name in moved:
            with suppress(OSError):
                (target / name).rename(temporary / name)
        shutil.rmtree(temporary, ignore_errors=True)


def _filled(target: Path) -> TargetNotEmpty:
    return TargetNotEmpty(f"{target} was filled by somebody else meanwhile")
