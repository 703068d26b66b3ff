"""Writes all of some bytes to an unbuffered file."""

from __future__ import annotations

from typing import BinaryIO


def write_all(file: BinaryIO, data: bytes) -> None:
    """Write `data` whole. A raw file may take less than it is given, as when a disk fills up in the middle.

    Raises OSError.
    """
    left = memoryview(data)
    while left:
        left = left[file.write(left) or 0 :]
