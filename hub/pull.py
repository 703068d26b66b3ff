"""Writes a version into a directory of the user's: checked, and whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path
from typing import Final

from hub import model_dir
from hub.adapter_dir import CONFIG_FILE
from hub.blobs import BlobStore
from hub.errors import BlobCorrupt, HubUnavailable, TargetNotEmpty
from hub.progress import Progress
from hub.staging import beside
from hub.verify import copy_checked
from hub.versions import Version

# Nothing can be put in the place of a mounted volume, or of a directory in one that others own.
_STAYS: Final = frozenset({errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EPERM, errno.EROFS})
_LOADED_FIRST: Final = (CONFIG_FILE, model_dir.CONFIG_FILE)


def write_directory(blobs: BlobStore, version: Version, target: Path, progress: Progress | None) -> None:
    """The files of `version` in `target`, which is absent or empty.

    An empty directory that nothing can take the place of (an empty volume's) gets them one after the other when all
    are there, the config that loaders look for last.

    Raises TargetNotEmpty, BlobCorrupt, or HubUnavailable where the directory cannot be written; then `target` is as it
    was before.
    """
    target = target.absolute()
    check_target(target)
    try:
        if target.is_mount():
            _fill(blobs, version, target, progress)
            return
        try:
            _replace(blobs, version, target, progress)
        except OSError as error:
            if error.errno not in _STAYS or not target.is_dir():
                raise
            _fill(blobs, version, target, progress)
    except OSError as error:
        raise _unwritable(target, error) from error


def check_target(target: Path) -> None:
    """Raise TargetNotEmpty where the directory is there and holds something, or is none; HubUnavailable."""
    try:
        free = not target.is_symlink() and (not target.exists() or (target.is_dir() and not _held(target)))
    except OSError as error:
        raise _unwritable(target.absolute(), error) from error
    if not free:
        raise TargetNotEmpty(f"{target.absolute()} is not an empty directory; give another or remove what is in it")


def _held(target: Path) -> set[str]:
    """What is in a directory; a new volume's own lost+found is nothing."""
    return {entry.name for entry in target.iterdir()} - ({"lost+found"} if target.is_mount() else set())


def _replace(blobs: BlobStore, version: Version, target: Path, progress: Progress | None) -> None:
    temporary = beside(target)
    try:
        temporary.mkdir()
        _write_files(blobs, version, temporary, progress)
        try:
            temporary.rename(target)  # replaces an empty directory, nothing else
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise _filled(target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(blobs: BlobStore, version: Version, target: Path, progress: Progress | None) -> None:
    temporary = target / f".{uuid.uuid4().hex}"
    moved: list[Path] = []
    try:
        temporary.mkdir()
        _write_files(blobs, version, temporary, progress)
        if _held(target) != {temporary.name}:
            raise _filled(target)
        for name in sorted(version.manifest.files, key=lambda name: name in _LOADED_FIRST):
            moved.append(target / name)
            (temporary / name).rename(target / name)
        moved.clear()
    finally:
        for path in moved:
            path.unlink(missing_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(blobs: BlobStore, version: Version, directory: Path, progress: Progress | None) -> None:
    files = version.manifest.files
    for name in files:  # checked when the manifest was read, and here once more: what is written stays in `directory`
        if name == ".." or "\0" in name or Path(name).name != name:
            raise BlobCorrupt(f"{version.text} has a file {name[:80]!a}, which is no plain file name")
    total, done = sum(entry.bytes for entry in files.values()), 0
    for name, entry in files.items():
        with (directory / name).open("xb") as file:
            copy_checked(blobs, entry.sha256, entry.bytes, f"{name} of {version.text}", file.write)
            file.flush()
            os.fsync(file.fileno())
        done += entry.bytes
        if progress is not None:
            progress("pulling", done, total)


def _filled(target: Path) -> TargetNotEmpty:
    return TargetNotEmpty(f"{target} was filled by somebody else meanwhile")


def _unwritable(target: Path, error: OSError) -> HubUnavailable:
    return HubUnavailable(f"{target} cannot be written: {os.strerror(error.errno or 0)}")
