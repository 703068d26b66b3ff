"""From an adapter that was read to a version: its base, its bytes, its entry, and what to warn of."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from hub.base_identity import BaseIdentity
from hub.blobs import BlobStore
from hub.catalog import Catalog, Publication, Published, Record
from hub.errors import AdapterChanged, BaseMismatch, BlobsSwept, FactsMalformed, RefInvalid
from hub.manifest import MAX_MANIFEST_BYTES, Manifest
from hub.parsing import Parsed
from hub.profile import Profile
from hub.progress import Progress
from hub.refs import LATEST, AdapterRef, Alias, Digest

MAX_LINE_CHARS: Final = 500
_ATTEMPTS: Final = 5
# How a file gets into the store: from where to, with the digest it was read to have; the digest it was stored as.
Stored = Callable[[BlobStore, Path, Digest], Digest]


def copied(blobs: BlobStore, path: Path, digest: Digest) -> Digest:
    """The file stays its owner's, who may change it: its bytes are copied and hashed."""
    with path.open("rb") as source:
        return blobs.put(source)[0]


def kept(blobs: BlobStore, path: Path, digest: Digest) -> Digest:
    """The file is the hub's own already and nobody can write it: it may become the blob itself."""
    return blobs.put_file(path, digest)


def publish(
    blobs: BlobStore, entries: Catalog, adapter: Parsed, manifest: Manifest, aliases: Sequence[str],
    progress: Progress | None, stored: Stored = copied,
) -> tuple[Record, Published]:  # fmt: skip
    """Store the bytes and enter the version; once more where a sweep took some of them in between."""
    for attempt in range(_ATTEMPTS):
        try:
            store_files(blobs, adapter, progress, stored)
            # Known content keeps its manifest; storing that again mends a damaged copy.
            known = entries.find(manifest.name, manifest.content)
            data = known.manifest if known is not None else manifest.canonical()
            digest, _ = blobs.put(io.BytesIO(data))
            needed = [digest, *(file.sha256 for file in adapter.files.values())]
            publication = Publication(manifest.name, digest, manifest.content, data)
            return entries.publish(
                publication,
                aliases,
                lambda needed=needed: not all(map(blobs.has, needed)),  # type: ignore[misc]
            )
        except BlobsSwept:
            if attempt + 1 == _ATTEMPTS:
                raise
    raise AssertionError("the last attempt returns or raises")


def warnings_about(record: Record, outcome: Published) -> tuple[str, ...]:
    """What whoever pushed may not expect of what became of it."""
    if outcome == "restored":
        return (f"{record.text} was removed; it is restored, and :latest is {record.text} now",)
    return ()


def check_manifest(manifest: Manifest) -> None:
    """Raise FactsMalformed where what people read in a manifest is no short line of text, or it is too large.

    What it says of the base and the creator comes from the pusher, who may be anybody, and is printed on terminals.
    """
    base = manifest.base
    lines = {
        "the creator": manifest.creator, "the base's name": base.name, "the base's revision": base.revision,
        "the base's quantization": base.quantization,
    }  # fmt: skip
    for what, text in lines.items():
        if text is not None and (len(text) > MAX_LINE_CHARS or not text.isprintable()):
            raise FactsMalformed(f"{what} is no printable line of at most {MAX_LINE_CHARS} characters")
    if base.fingerprint is not None:
        try:
            Digest.parse(base.fingerprint)
        except RefInvalid as error:
            raise FactsMalformed("the base's fingerprint is no digest") from error
    if len(manifest.canonical()) > MAX_MANIFEST_BYTES:
        raise FactsMalformed(f"the version's manifest would have more than {MAX_MANIFEST_BYTES} bytes")


def check_profile(file: Path | None, manifest: Manifest) -> None:
    """Raise ProfileRefused where the hub's profile in `file` forbids the adapter, ProfileMalformed."""
    if file is not None:
        Profile.read(file).check(manifest)


def pushed_aliases(ref: AdapterRef) -> list[str]:
    """The alias that a push to `ref` moves besides "latest"."""
    if not isinstance(ref.selector, Alias):
        raise RefInvalid(f"{ref}: the hub numbers versions itself; push to {ref.full_name}")
    return [] if ref.selector.name == LATEST else [ref.selector.name]


def identity_of(adapter: Parsed, located: BaseIdentity | None) -> BaseIdentity:
    """The base as `--base` found it, else as loraplex.json says, else as PEFT's config names it."""
    recorded = adapter.facts.base
    if located is None:
        return recorded or BaseIdentity(_portable(adapter.recorded_base[0]), adapter.recorded_base[1])
    if recorded is None:
        return located
    if recorded.fingerprint is not None and recorded.fingerprint != located.fingerprint:
        raise BaseMismatch(
            f"the adapter was trained on the base {recorded.name!r} with another fingerprint than {located.name!r} has"
        )
    return replace(located, quantization=recorded.quantization)


def _portable(name: str | None) -> str | None:
    """A base's name without the directories of the machine it was trained on."""
    return Path(name).name if name and name.startswith(("/", "~", ".")) else name or None


def warnings_of(adapter: Parsed, identity: BaseIdentity) -> tuple[str, ...]:
    """What is sound, but perhaps not what was meant."""
    warnings = []
    if adapter.changes_nothing:
        warnings.append("the adapter changes nothing: its delta is zero everywhere (untrained?)")
    if identity.fingerprint is None:
        name = identity.name or "unknown"
        warnings.append(f"the base ({name}) is unverified: give --base to have every tensor checked against it")
    return tuple(warnings)


def store_files(blobs: BlobStore, adapter: Parsed, progress: Progress | None, stored: Stored = copied) -> None:
    """Store an adapter's files; raises AdapterChanged where one is not what was read before."""
    done = 0
    for file in adapter.files.values():
        if stored(blobs, adapter.directory / file.name, file.sha256) != file.sha256:
            raise AdapterChanged(f"{file.name} changed while it was being pushed; nothing was published")
        done += file.bytes
        if progress is not None:
            progress("storing", done, adapter.bytes)
