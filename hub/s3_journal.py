"""The journal as S3 objects: `<prefix>/journal/<thousands>/<number>.json`, both of twelve digits."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Final

import obstore
from obstore import exceptions

from hub.blobs.bucket import Bucket, no_bucket, reasons
from hub.blobs.local import Step, no_step
from hub.blobs.s3 import unconditional
from hub.errors import BlobCorrupt, HubUnavailable
from hub.journal import OTHER_STORY, Journal, decode

_NAME: Final = re.compile(r"journal/[0-9]{12}/([0-9]{12})\.json", re.ASCII)
_AT_ONCE: Final = 16


class S3Journal(Journal):
    """A journal beside the blobs of a bucket."""

    def __init__(self, bucket: Bucket, *, step: Step = no_step) -> None:
        self._bucket = bucket
        self._store = bucket.connect()
        self._step = step

    def put(self, batch: int, data: bytes) -> None:
        """Store a record; on return it survives a crash. See `Journal.put`."""
        self._step("journal:write")
        with reasons(self._bucket):
            try:
                obstore.put(self._store, _key(batch), data, mode="create", use_multipart=False)
                return
            except exceptions.AlreadyExistsError:
                pass
            except exceptions.BaseError as error:
                # Records are written under the catalog's lock, or are the same from all who write them.
                if not unconditional(error):
                    raise
        there = self._get(batch)
        if there == data:
            return
        if there is not None:
            try:
                decode(batch, there)
            except BlobCorrupt:
                pass  # damaged since it was written
            else:
                raise HubUnavailable(OTHER_STORY)
        with reasons(self._bucket):
            obstore.put(self._store, _key(batch), data, use_multipart=False)

    def has(self, batch: int) -> bool:
        """Whether the record is there."""
        with reasons(self._bucket):
            try:
                obstore.head(self._store, _key(batch))
            except FileNotFoundError as error:
                if no_bucket(error):
                    raise
                return False
        return True

    def read(self) -> Iterator[tuple[int, bytes]]:
        """All records, by number, unchecked."""
        with reasons(self._bucket):
            paths = [meta["path"] for found in obstore.list(self._store, "journal") for meta in found]
        numbers = iter(sorted(int(found[1]) for path in paths if (found := _NAME.fullmatch(path))))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            while batch := list(islice(numbers, 8 * _AT_ONCE)):
                for number, data in zip(batch, pool.map(self._get, batch), strict=True):
                    if data is not None:
                        yield number, data

    def _get(self, batch: int) -> bytes | None:
        with reasons(self._bucket):
            try:
                return bytes(obstore.get(self._store, _key(batch)).bytes())
            except FileNotFoundError as error:
                if no_bucket(error):
                    raise
                return None


def _key(batch: int) -> str:
    return f"journal/{batch // 1000:012}/{batch:012}.json"
