"""Members of a source archive, read without extracting anything."""

from __future__ import annotations

import tarfile
from typing import Final

from training.errors import SourceUnavailable

MAX_MEMBER_BYTES: Final = 16 * 1024 * 1024


def read_member(archive: tarfile.TarFile, name: str, limit: int = MAX_MEMBER_BYTES) -> bytes:
    """A member's bytes: of a plain file of at most `limit` bytes, and nothing else. Raises `SourceUnavailable`."""
    try:
        member = archive.getmember(name)
    except KeyError:
        raise SourceUnavailable(f"the source archive has no {name}") from None
    file = archive.extractfile(member) if member.isreg() else None
    if file is None or member.size > limit:
        raise SourceUnavailable(f"{name} in the source archive is no plain file of bounded size")
    with file:
        return file.read()
