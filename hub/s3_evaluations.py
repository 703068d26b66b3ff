"""The records of evaluations as S3 objects: `<prefix>/evaluations/<64 digits>/<name>`."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import obstore

from hub.blobs.bucket import Bucket, no_bucket, reasons
from hub.evaluation_records import Records
from hub.refs import Digest

_ROOT: Final = "evaluations"
_NAME: Final = re.compile(r"[0-9][^/]*\.json")
_PLACE: Final = re.compile(_ROOT + r"/([0-9a-f]{64})/?", re.ASCII)
_AT_ONCE: Final = 16


class S3Records(Records):
    """Records beside the blobs of a bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._store = bucket.connect()

    def write(self, digest: Digest, name: str, data: bytes) -> None:
        """Keep a record; an object appears whole."""
        with reasons(self._bucket):
            obstore.put(self._store, f"{_place(digest)}/{name}", data, use_multipart=False)

    def names(self, digest: Digest) -> list[str]:
        """The names of a version's records, in order."""
        names = (meta["path"].rpartition("/")[2] for meta in self._objects(digest))
        return sorted(name for name in names if _NAME.fullmatch(name))

    def read(self, digest: Digest) -> list[tuple[str, bytes]]:
        """A version's records with their names, in order, unchecked."""
        names = self.names(digest)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            read = pool.map(lambda name: self._get(f"{_place(digest)}/{name}"), names)
            return [(name, data) for name, data in zip(names, read, strict=True) if data is not None]

    def digests(self) -> list[Digest]:
        """Of the versions that have records, in order."""
        with reasons(self._bucket):
            places = obstore.list_with_delimiter(self._store, _ROOT)["common_prefixes"]
        return sorted(Digest.of_hex(found[1]) for place in places if (found := _PLACE.fullmatch(place)))

    def size(self, digest: Digest) -> int:
        """Bytes of its objects."""
        return sum(meta["size"] for meta in self._objects(digest))

    def remove(self, digest: Digest) -> None:
        """Delete all of a version's records."""
        for meta in self._objects(digest):
            with reasons(self._bucket):
                try:
                    obstore.delete(self._store, meta["path"])
                except FileNotFoundError as error:
                    if no_bucket(error):
                        raise

    def _objects(self, digest: Digest) -> list[Any]:
        with reasons(self._bucket):
            return [meta for found in obstore.list(self._store, _place(digest)) for meta in found]

    def _get(self, key: str) -> bytes | None:
        with reasons(self._bucket):
            try:
                return bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError as error:
                if no_bucket(error):
                    raise
                return None


def _place(digest: Digest) -> str:
    return f"{_ROOT}/{Digest.parse(digest).hex}"  # parsed again: a key is made of it
