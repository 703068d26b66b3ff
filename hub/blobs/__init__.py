"""Content-addressed bytes: the contract every storage engine keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import BinaryIO

from hub.refs import Digest


class BlobStore(ABC):
    """Immutable bytes under their SHA-256.

    - `put` returns only when the bytes survive a crash. A blob is visible whole or not at all; a `put` that was cut
      short leaves nothing that `open`, `has` or `digests` shows.
    - Putting bytes that are there already succeeds and changes nothing, also from several processes at once. Where the
      stored copy turned out damaged, the new bytes replace it.
    - Readers get what is stored, unchecked; whoever hands bytes on hashes them first (`Hub.read_file`, `Hub.pull`).
    - Methods are safe to call from several threads. All raise HubUnavailable where the storage fails (no space, no
      permission, I/O error), and never show a path of the store.
    """

    @abstractmethod
    def put(self, source: BinaryIO) -> tuple[Digest, int]:
        """Store what is left of `source`; its digest and length in bytes."""

    @abstractmethod
    def open(self, digest: Digest) -> BinaryIO:
        """The blob as a binary file for the caller to close; raises BlobNotFound."""

    @abstractmethod
    def has(self, digest: Digest) -> bool:
        """Whether the blob is there; says nothing of its health."""

    @abstractmethod
    def digests(self) -> Iterator[Digest]:
        """All blobs, in no particular order."""
