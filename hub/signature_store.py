"""Signatures beside versions: kept as blobs, read hashed, looked at by `verify`."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

from hub.blobs import BlobStore
from hub.catalog import Catalog, Record
from hub.errors import BlobCorrupt, BlobNotFound, BlobsSwept, HubError
from hub.refs import Digest
from hub.signing.envelope import MAX_SIGNATURE_BYTES, check_signature
from hub.verify import read_manifest
from hub.versions import Problem, Version

_ATTEMPTS = 5


class KeptSignatures:
    """The part of `hub.hub.Hub` that is about signatures."""

    _blobs: BlobStore
    _catalog: Catalog

    def add_signature(self, digest: Digest | str, signature: bytes) -> bool:
        """Keep a signature of the version with this digest (see `hub.signing`); False where it is there already.

        Whether a key made it is for who trusts the key to check; that it is a signature of this version is checked
        here. Raises SignatureInvalid, AdapterNotFound.
        """
        record = self._catalog.get(Digest.parse(digest))
        check_signature(signature, self._signed(record))
        for attempt in range(_ATTEMPTS):
            try:
                stored, _ = self._blobs.put(io.BytesIO(signature))
                return self._catalog.sign(record.digest, stored, lambda stored=stored: not self._blobs.has(stored))  # type: ignore[misc]
            except BlobsSwept:
                if attempt + 1 == _ATTEMPTS:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def signatures(self, digest: Digest | str) -> tuple[bytes, ...]:
        """The signatures of the version with this digest, as they were added; raises BlobCorrupt, AdapterNotFound."""
        record = self._catalog.get(Digest.parse(digest))
        what = f"a signature of {record.text}"
        return tuple(read_small(self._blobs, found, what) for found in self._catalog.signatures(record))

    def _signed(self, record: Record) -> Version:
        manifest = read_manifest(self._blobs, record)
        return Version(record.full_name, record.number, record.digest, manifest, manifest.created)


def read_small(blobs: BlobStore, digest: Digest, what: str) -> bytes:
    """A blob as large as a signature may be, hashed; raises BlobCorrupt, with `what` in its words."""
    try:
        with blobs.open(digest) as source:
            data = source.read(MAX_SIGNATURE_BYTES + 1)
    except BlobNotFound as error:
        raise BlobCorrupt(f"{what} is missing from the hub's storage") from error
    if hashlib.sha256(data).hexdigest() != digest.hex:
        raise BlobCorrupt(f"{what} is damaged in the hub's storage")
    return data


def problems(blobs: BlobStore, catalog: Catalog, records: Sequence[Record]) -> list[Problem]:
    """What is wrong with the signatures of these versions: damaged, or not of the version they are kept for."""
    blobs = blobs.stored()
    by_version: dict[tuple[str, int], list[Digest]] = {}
    if len(records) == 1:
        by_version[records[0].full_name, records[0].number] = catalog.signatures(records[0])
    else:
        for name, number, digest in catalog.all_signatures():
            by_version.setdefault((name, number), []).append(digest)
    found: list[Problem] = []
    for record in records:
        for digest in by_version.get((record.full_name, record.number), ()):
            try:
                data = read_small(blobs, digest, f"a signature of {record.text}")
                manifest = read_manifest(blobs, record)
                version = Version(record.full_name, record.number, record.digest, manifest, manifest.created)
                check_signature(data, version)
            except HubError as error:
                found.append(Problem(record.text, f"signature {digest.hex[:16]}", error.reason, str(error)))
    return found
