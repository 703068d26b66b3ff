"""Reads stored bytes and hashes them: whoever hands bytes on has had them checked here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Final

from hub.blobs import BlobStore
from hub.catalog import Record
from hub.errors import BlobCorrupt, BlobNotFound, HubError, NotCached
from hub.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest
from hub.progress import Progress
from hub.refs import Digest
from hub.versions import Problem, Version

_CHUNK: Final = 1024 * 1024
_DAMAGED: Final = "{} is damaged in the hub's storage: its bytes are not those that were pushed"


def copy_checked(blobs: BlobStore, digest: Digest, size: int, what: str, take: Callable[[bytes], object]) -> None:
    """Hand the blob's bytes to `take`, chunk by chunk; raises BlobCorrupt, at the end, where they are not `digest`.

    `what` names the bytes in the message. `take` must not let them out before this returns.
    """
    hasher, length = hashlib.sha256(), 0
    try:
        with blobs.open(digest) as source:
            while chunk := source.read(_CHUNK):
                length += len(chunk)
                if length > size:
                    break
                hasher.update(chunk)
                take(chunk)
    except BlobNotFound as error:
        raise BlobCorrupt(f"{what} is missing from the hub's storage") from error
    except NotCached as error:
        raise NotCached(f"{what}: {error}") from error
    except BlobCorrupt as error:  # a cache found out while it fetched
        raise BlobCorrupt(_DAMAGED.format(what)) from error
    if length != size or hasher.hexdigest() != digest.hex:
        raise BlobCorrupt(_DAMAGED.format(what))


def read_manifest(blobs: BlobStore, record: Record) -> Manifest:
    """The manifest of a version: the catalog's copy, or the blob where that is damaged; raises BlobCorrupt."""
    return Manifest.parse(manifest_bytes(blobs, record))


def manifest_bytes(blobs: BlobStore, record: Record) -> bytes:
    """The bytes of a version's manifest, hashed and not parsed; raises BlobCorrupt."""
    if hashlib.sha256(record.manifest).hexdigest() == record.digest.hex:
        return record.manifest
    text = f"{record.full_name}@{record.number}"
    try:
        with blobs.open(record.digest) as source:
            data = source.read(MAX_MANIFEST_BYTES)
    except (BlobNotFound, BlobCorrupt):
        data = b""
    if hashlib.sha256(data).hexdigest() != record.digest.hex:
        raise BlobCorrupt(f"the manifest of {text} is damaged in the catalog and in the hub's storage")
    return data


def read_checked(blobs: BlobStore, version: Version, filename: str) -> bytes:
    """The bytes of a file that the version's manifest lists; raises BlobCorrupt."""
    entry = version.manifest.files[filename]
    data = bytearray()
    copy_checked(blobs, entry.sha256, entry.bytes, f"{filename} of {version.text}", data.extend)
    return bytes(data)


def check_versions(blobs: BlobStore, records: Sequence[Record], progress: Progress | None) -> list[Problem]:
    """What is wrong with these versions' manifests and files; every blob is read once."""
    blobs = blobs.stored()
    problems: list[Problem] = []
    files: list[tuple[str, str, FileEntry]] = []
    for record in records:
        text = f"{record.full_name}@{record.number}"
        try:
            if hashlib.sha256(record.manifest).hexdigest() != record.digest.hex:
                raise BlobCorrupt("the catalog's copy of the manifest is damaged")
            manifest = Manifest.parse(record.manifest)
        except HubError as error:
            problems.append(Problem(text, "manifest", error.reason, str(error)))
            continue
        files.append((text, "manifest", FileEntry(record.digest, len(record.manifest))))
        files += [(text, name, entry) for name, entry in manifest.files.items()]
    outcomes: dict[Digest, tuple[str, HubError | None]] = {}  # with what the error calls the bytes
    total, done = sum({entry.sha256: entry.bytes for _, _, entry in files}.values()), 0
    for text, name, entry in files:
        what = f"{name} of {text}"
        if entry.sha256 not in outcomes:
            outcomes[entry.sha256] = what, _outcome(blobs, entry, what)
            done += entry.bytes
            if progress is not None:
                progress("verifying", done, total)
        first, outcome = outcomes[entry.sha256]
        if outcome is not None:
            problems.append(Problem(text, name, outcome.reason, str(outcome).replace(first, what, 1)))
    return problems


def _outcome(blobs: BlobStore, entry: FileEntry, what: str) -> HubError | None:
    try:
        copy_checked(blobs, entry.sha256, entry.bytes, what, len)
    except HubError as error:
        return error
    return None
