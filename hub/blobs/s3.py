"""Blobs as S3 objects: `<prefix>/blobs/sha256/<first two digits>/<64 hex digits>`.

An object appears whole, when its upload ends, so nothing is staged under another name and copied. Small blobs are one
conditional request. Large ones go up in parts, under a marker in `<prefix>/blobs/staging` that says that somebody is at
it: the parts of an upload that died can be seen by the service alone, whose lifecycle rule for incomplete multipart
uploads gives them back.
"""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO, Final, cast

import obstore
from obstore import exceptions

from hub.blobs import BlobInfo, BlobStore, Unfinished
from hub.blobs.bucket import Bucket, no_bucket, reason_of, reasons
from hub.blobs.local import Step, no_step, storage_unavailable
from hub.errors import BlobNotFound, BlobsSwept, HubUnavailable, StorageUnreachable
from hub.refs import Digest

SINGLE_BYTES: Final = 32 * 1024 * 1024  # blobs up to this size go up in one request, from memory
PART_BYTES: Final = 16 * 1024 * 1024
_CHUNK: Final = 1024 * 1024
_PARTS_AT_ONCE: Final = 4
_RESUMES: Final = 5  # broken downloads taken up again without a byte between them
_PAUSE_SECONDS: Final = 0.2  # before the first; doubled each time
_BLOBS: Final = "blobs/sha256"
_STAGING: Final = "blobs/staging"
_NAME: Final = re.compile(_BLOBS + r"/([0-9a-f]{2})/(\1[0-9a-f]{62})", re.ASCII)


class S3BlobStore(BlobStore):
    """Blobs in a bucket of an S3 service."""

    def __init__(
        self, bucket: Bucket, *, step: Step = no_step, single_bytes: int = SINGLE_BYTES, part_bytes: int = PART_BYTES
    ) -> None:
        self._bucket = bucket
        self._store = bucket.connect()
        self._step = step
        self._single_bytes = single_bytes
        self._part_bytes = part_bytes

    def put(self, source: BinaryIO) -> tuple[Digest, int]:
        """Store what is left of `source`; its digest and length in bytes."""
        self._step("blob:create")
        try:
            head = _read(source, self._single_bytes + 1)
            if len(head) <= self._single_bytes:
                digest = Digest.of_hex(hashlib.sha256(head).hexdigest())
                self._keep(digest, len(head), io.BytesIO(head), 0)
                return digest, len(head)
            return self._put_large(head, source)
        except FileNotFoundError as error:
            raise reason_of(error, self._bucket) from error
        except OSError as error:
            raise storage_unavailable(error) from error

    def open(self, digest: Digest) -> BinaryIO:
        """The blob as a binary file for the caller to close; raises BlobNotFound."""
        file = tempfile.SpooledTemporaryFile(max_size=self._single_bytes)  # noqa: SIM115 - the caller closes it
        try:
            self.fetch(digest, file.write)
            file.seek(0)
        except OSError as error:
            file.close()
            raise storage_unavailable(error) from error
        except BaseException:
            file.close()
            raise
        return cast(BinaryIO, file)

    def fetch(self, digest: Digest, take: Callable[[bytes], object], start: int = 0) -> None:
        """Hand the stored bytes from `start` on to `take`, in order and unchecked.

        A connection that breaks is taken up where it broke, and only on the same object. Raises BlobNotFound,
        HubUnavailable.
        """
        key, position, end, etag, failures = _key(digest), start, None, None, 0
        while end is None or position < end:
            try:
                options: obstore.GetOptions = {}
                if position:
                    options["range"] = {"offset": position}
                if etag is not None:
                    options["if_match"] = etag
                result = obstore.get(self._store, key, options=options)
                end, etag = result.meta["size"], result.meta["e_tag"]
                for chunk in result.stream(min_chunk_size=_CHUNK):
                    take(bytes(chunk))
                    position += len(chunk)
                    failures = 0
                if position < end:
                    raise exceptions.GenericError("the connection ended before the object")
            except FileNotFoundError as error:
                raise self._absent(error, digest) from error
            except exceptions.PreconditionError as error:
                raise HubUnavailable("a file of the hub was replaced while it was read; try again") from error
            except exceptions.BaseError as error:
                reason = reason_of(error, self._bucket)
                failures += 1
                if failures > _RESUMES or not isinstance(reason, StorageUnreachable):
                    raise reason from error
                if not position:
                    raise reason from error  # obstore has tried before; there is nothing to lose
                time.sleep(_PAUSE_SECONDS * 2 ** (failures - 1))

    def has(self, digest: Digest) -> bool:
        """Whether the blob is there; says nothing of its health."""
        try:
            self.info(digest)
        except BlobNotFound:
            return False
        return True

    def digests(self) -> Iterator[Digest]:
        """All blobs, in no particular order."""
        return (digest for digest, _ in self.infos())

    def infos(self) -> Iterator[tuple[Digest, BlobInfo]]:
        """All blobs with what the storage knows of them: a request a thousand."""
        for path, info in self._list(_BLOBS):
            if found := _NAME.fullmatch(path):
                yield Digest.of_hex(found[2]), info

    def info(self, digest: Digest) -> BlobInfo:
        """Size and time of a blob; raises BlobNotFound."""
        key = _key(digest)
        with reasons(self._bucket):
            try:
                meta = obstore.head(self._store, key)
            except FileNotFoundError as error:
                raise self._absent(error, digest) from error
        return BlobInfo(meta["size"], meta["last_modified"].timestamp())

    def delete(self, digest: Digest) -> None:
        """Give the blob's bytes back; nothing happens where it is not there."""
        key = _key(digest)
        self._step("blob:delete")
        self._delete(key)

    def unfinished(self) -> Iterator[Unfinished]:
        """The markers of large puts that run or died; their parts are the service's to count."""
        for path, info in self._list(_STAGING):
            yield Unfinished(path.rpartition("/")[2], info.bytes, info.modified)

    def discard(self, unfinished: Unfinished) -> None:
        """Remove one of `unfinished`; a put that still writes it fails and leaves nothing."""
        self._delete(_marker(unfinished.name))

    def _put_large(self, head: bytes, source: BinaryIO) -> tuple[Digest, int]:
        """Read twice, as the name must be known before the first byte goes up."""
        with tempfile.TemporaryFile() as copy:
            seekable = source.seekable()
            start = source.tell() - len(head) if seekable else 0
            hasher, size = hashlib.sha256(head), len(head)
            if not seekable:
                copy.write(head)
            while chunk := source.read(_CHUNK):
                hasher.update(chunk)
                size += len(chunk)
                if not seekable:
                    copy.write(chunk)
            digest = Digest.of_hex(hasher.hexdigest())
            self._keep(digest, size, source if seekable else cast(BinaryIO, copy), start)
        return digest, size

    def _keep(self, digest: Digest, size: int, source: BinaryIO, start: int) -> None:
        """Put the bytes under their name, if they are not there whole."""
        with reasons(self._bucket):
            try:
                there = obstore.head(self._store, _key(digest))["size"]
            except FileNotFoundError:
                there = None
        if there is None:
            self._step("blob:write")
            if self._upload(digest, size, source, start, "create"):
                return
        elif there == size and self._sound(digest):
            return
        # Damaged, or somebody was first and may have been cut short: these bytes have the right digest.
        self._upload(digest, size, source, start, "overwrite")

    def _upload(self, digest: Digest, size: int, source: BinaryIO, start: int, how: str) -> bool:
        """Whether the bytes are there now; False where somebody else's are."""
        source.seek(start)
        if size > self._single_bytes:
            self._upload_parts(digest, source)
            return True
        data = source.read()
        with reasons(self._bucket):
            if how == "create":
                try:
                    obstore.put(self._store, _key(digest), data, mode="create", use_multipart=False)
                    return True
                except exceptions.AlreadyExistsError:
                    return self._sound(digest)
                except exceptions.BaseError as error:
                    if not unconditional(error):
                        raise
            obstore.put(self._store, _key(digest), data, use_multipart=False)
        return True

    def _upload_parts(self, digest: Digest, source: BinaryIO) -> None:
        """The bytes once more, in parts; nothing is seen of them where they are no longer those first read."""
        key, marker, hasher = _key(digest), _marker(uuid.uuid4().hex), hashlib.sha256()
        with reasons(self._bucket):
            obstore.put(self._store, marker, b"", use_multipart=False)
            writer = obstore.open_writer(self._store, key, buffer_size=self._part_bytes, max_concurrency=_PARTS_AT_ONCE)
        try:
            while chunk := source.read(_CHUNK):
                hasher.update(chunk)
                with reasons(self._bucket):
                    writer.write(chunk)
            if hasher.hexdigest() != digest.hex:
                raise HubUnavailable("the file changed while it was being stored; nothing was stored")
            self._step("blob:complete")
            with reasons(self._bucket):
                try:
                    obstore.head(self._store, marker)
                except FileNotFoundError as error:
                    raise BlobsSwept("a sweep took what was being stored: push again") from error
                writer.close()  # only now there is an object; a writer that is dropped leaves none
        finally:
            with suppress(HubUnavailable):
                self._delete(marker)

    def _sound(self, digest: Digest) -> bool:
        """Whether the stored bytes still have the digest in their name."""
        hasher = hashlib.sha256()
        try:
            self.fetch(digest, hasher.update)
        except BlobNotFound:
            return False
        return hasher.hexdigest() == digest.hex

    def _list(self, prefix: str) -> Iterator[tuple[str, BlobInfo]]:
        with reasons(self._bucket):
            for batch in obstore.list(self._store, prefix):
                for meta in batch:
                    yield meta["path"], BlobInfo(meta["size"], meta["last_modified"].timestamp())

    def _delete(self, key: str) -> None:
        with reasons(self._bucket):
            try:
                obstore.delete(self._store, key)
            except FileNotFoundError as error:
                if no_bucket(error):
                    raise

    def _absent(self, error: FileNotFoundError, digest: Digest) -> HubUnavailable | BlobNotFound:
        return reason_of(error, self._bucket) if no_bucket(error) else BlobNotFound(f"the store has no {digest}")


def unconditional(error: exceptions.BaseError) -> bool:
    """Whether the service does not know conditional puts (501 NotImplemented)."""
    return isinstance(error, exceptions.NotSupportedError) or "<Code>NotImplemented</Code>" in str(error)


def _read(source: BinaryIO, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and (chunk := source.read(min(_CHUNK, size - len(data)))):
        data += chunk
    return bytes(data)


def _key(digest: Digest) -> str:
    hex_digits = Digest.parse(digest).hex  # parsed again: a key is made of it
    return f"{_BLOBS}/{hex_digits[:2]}/{hex_digits}"


def _marker(name: str) -> str:
    return f"{_STAGING}/{name.rpartition('/')[2]}"
