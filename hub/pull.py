"""Writes a version into a directory of the user's: checked, and whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from pathlib import Path

from hub.blobs import BlobStore
from hub.errors import HubUnavailable, TargetNotEmpty
from hub.progress import Progress
from hub.verify import copy_checked
from hub.versions import Version


def write_directory(blobs: BlobStore, version: Version, target: Path, progress: Progress | None) -> None:
    """The files of `version` in `target`, which is absent or empty.

    Raises TargetNotEmpty, BlobCorrupt, or HubUnavailable where the directory cannot be written; then `target` is as it
    was before.
    """
    target = target.absolute()
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        check_target(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        _write_files(blobs, version, temporary, progress)
        try:
            temporary.rename(target)  # replaces an empty directory, nothing else
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise TargetNotEmpty(f"{target} was filled by somebody else meanwhile") from error
    except OSError as error:
        raise HubUnavailable(f"{target} cannot be written: {os.strerror(error.errno or 0)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(target: Path) -> None:
    """Raise TargetNotEmpty where the directory is there and holds something, or is none."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise TargetNotEmpty(f"{target.absolute()} is not an empty directory; give another or remove what is in it")


def _write_files(blobs: BlobStore, version: Version, directory: Path, progress: Progress | None) -> None:
    files = version.manifest.files
    total, done = sum(entry.bytes for entry in files.values()), 0
    for name, entry in files.items():
        with (directory / name).open("xb") as file:
            copy_checked(blobs, entry.sha256, entry.bytes, f"{name} of {version.text}", file.write)
            file.flush()
            os.fsync(file.fileno())
        done += entry.bytes
        if progress is not None:
            progress("pulling", done, total)
