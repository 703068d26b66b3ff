"""Content-addressed bytes: the contract every storage engine keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from hub.errors import BlobNotFound
from hub.refs import Digest


@dataclass(frozen=True)
class BlobInfo:
    """What the storage knows of a blob without reading it."""

    bytes: int
    modified: float  # Unix time of the last put that wrote it


@dataclass(frozen=True)
class Unfinished:
    """Bytes of a put that has not come to its end, and perhaps never will."""

    name: str
    bytes: int
    modified: float  # Unix time of the last write


class BlobStore(ABC):
    """Immutable bytes under their SHA-256.

    - `put` returns only when the bytes survive a crash. A blob is visible whole or not at all; a `put` that was cut
      short leaves nothing that `open`, `has` or `digests` shows. Raises BlobsSwept where `delete` or `discard` took
      what it was working on: the caller puts the bytes again.
    - Putting bytes that are there already succeeds and changes nothing, also from several processes at once. Where the
      stored copy turned out damaged, the new bytes replace it.
    - Readers get what is stored, unchecked; whoever hands bytes on hashes them first (`Hub.read_file`, `Hub.pull`).
      A store that checks what it fetches raises BlobCorrupt from `open` instead.
    - Methods are safe to call from several threads. All raise HubUnavailable where the storage fails (no space, no
      permission, I/O error), and never show a path of the store.
    """

    @abstractmethod
    def put(self, source: BinaryIO) -> tuple[Digest, int]:
        """Store what is left of `source`; its digest and length in bytes."""

    def put_file(self, path: Path, digest: Digest) -> Digest:
        """Store the file `path`, which has this digest and which nobody can write any more; the digest it got.

        A store on the same file system keeps the file itself, under another name, and makes it read-only.
        """
        with path.open("rb") as source:
            return self.put(source)[0]

    def flush_file(self, path: Path) -> bool:
        """Make a file durable that `put_file` is to keep, so that it takes less; False where the store keeps none."""
        return False

    @abstractmethod
    def open(self, digest: Digest) -> BinaryIO:
        """The blob as a binary file for the caller to close; raises BlobNotFound."""

    @abstractmethod
    def has(self, digest: Digest) -> bool:
        """Whether the blob is there; says nothing of its health."""

    @abstractmethod
    def digests(self) -> Iterator[Digest]:
        """All blobs, in no particular order."""

    @abstractmethod
    def info(self, digest: Digest) -> BlobInfo:
        """Size and time of a blob; raises BlobNotFound."""

    def infos(self) -> Iterator[tuple[Digest, BlobInfo]]:
        """All blobs with their `info`; stores that list both at once do."""
        for digest in self.digests():
            with suppress(BlobNotFound):  # a sweep was quicker
                yield digest, self.info(digest)

    def stored(self) -> BlobStore:
        """The store whose bytes are the hub's: what lies behind a cache, else this one. `verify` reads there."""
        return self

    @abstractmethod
    def delete(self, digest: Digest) -> None:
        """Give the blob's bytes back; nothing happens where it is not there.

        Whoever calls this holds the catalog's write lock (see `hub.sweep`). Readers that have it open read on.
        """

    @abstractmethod
    def unfinished(self) -> Iterator[Unfinished]:
        """What puts that died left behind, and what running ones are writing."""

    @abstractmethod
    def discard(self, unfinished: Unfinished) -> None:
        """Remove one of `unfinished`; a put that still writes it fails and leaves nothing."""
