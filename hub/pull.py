"""Writes a version into a directory of the user's: checked, and whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from hub import staging
from hub.blobs import BlobStore
from hub.errors import BlobCorrupt, HubUnavailable, TargetNotEmpty
from hub.progress import Progress
from hub.verify import copy_checked
from hub.versions import Version


def write_directory(blobs: BlobStore, version: Version, target: Path, progress: Progress | None) -> None:
    """The files of `version` in `target`, which is absent or empty; see `staging.write_directory`.

    Raises TargetNotEmpty, BlobCorrupt, or HubUnavailable where the directory cannot be written; then `target` is as it
    was before.
    """
    target = target.absolute()
    check_target(target)
    try:
        staging.write_directory(target, lambda directory: _write_files(blobs, version, directory, progress))
    except OSError as error:
        raise _unwritable(target, error) from error


def check_target(target: Path) -> None:
    """Raise TargetNotEmpty where the directory is there and holds something, or is none; HubUnavailable."""
    try:
        free = not target.is_symlink() and (not target.exists() or (target.is_dir() and not staging.held(target)))
    except OSError as error:
        raise _unwritable(target.absolute(), error) from error
    if not free:
        raise TargetNotEmpty(f"{target.absolute()} is not an empty directory; give another or remove what is in it")


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


def _unwritable(target: Path, error: OSError) -> HubUnavailable:
    return HubUnavailable(f"{target} cannot be written: {os.strerror(error.errno or 0)}")
