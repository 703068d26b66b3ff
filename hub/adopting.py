"""Takes in versions of another hub: read as any adapter is read, stored, entered in one transaction."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hub.arrivals import MAX_ARRIVALS, Adopted, AliasArrival, Arrival, LayOut, read_as_told
from hub.blobs import BlobStore
from hub.catalog import Catalog
from hub.catalog_adoption import Adoption
from hub.errors import AdapterNotFound, BlobsSwept, BundleRefused
from hub.fingerprint import known_shapes
from hub.manifest import MAX_MANIFEST_BYTES
from hub.progress import Progress
from hub.publishing import check_manifest, check_profile, store_files
from hub.refs import AdapterRef, Alias, Digest
from hub.splitting import checked_split
from hub.versions import Version

_ATTEMPTS = 5


class AdoptedVersions:
    """The part of `hub.hub.Hub` that takes in versions of another hub."""

    _blobs: BlobStore
    _catalog: Catalog
    profile_file: Path | None

    def adopt(
        self,
        arrivals: Sequence[Arrival],
        lay_out: LayOut,
        *,
        aliases: Sequence[AliasArrival] = (),
        renumber: bool = False,
        progress: Progress | None = None,
    ) -> list[Adopted]:
        """Enter versions of another hub as they are there, all or none; what became of each.

        `lay_out` gives an arrival's files. They are read as any adapter is read, and must be what the manifest says. A
        version keeps its digest; its number too, or with `renumber` it gets the next one where that was given here
        before. What is here already is left as it is, signatures are added.

        Raises VersionClash, BundleRefused, SignatureInvalid, a subclass of AdapterRejected (ProfileRefused among them).
        """
        self._catalog.check_writable()
        check(arrivals, aliases)
        for arrival in arrivals:
            if not self._is_here(arrival):
                check_profile(self.profile_file, arrival.manifest)
        for attempt in range(_ATTEMPTS):
            adoptions = [self._take_in(arrival, lay_out, progress) for arrival in arrivals]
            try:
                entered = self._catalog.adopt(adoptions, aliases, lambda: self._gone(arrivals, adoptions), renumber)  # noqa: B023
                break
            except BlobsSwept:
                if attempt + 1 == _ATTEMPTS:
                    raise
        return [
            Adopted(
                Version(record.full_name, record.number, record.digest, arrival.manifest, arrival.manifest.created),
                arrival.number, outcome, added,
            )
            for arrival, (record, outcome, added) in zip(arrivals, entered, strict=True)
        ]  # fmt: skip

    def _take_in(self, arrival: Arrival, lay_out: LayOut, progress: Progress | None) -> Adoption:
        if not self._is_here(arrival):
            with lay_out(arrival) as directory:
                adapter = read_as_told(arrival, directory)
                shapes = arrival.manifest.base.fingerprint and known_shapes(arrival.manifest.base.fingerprint)
                if shapes:
                    adapter.check_binds(shapes)
                store_files(self._blobs, adapter, progress)
        data = arrival.manifest.canonical()
        self._blobs.put(io.BytesIO(data))
        signatures = [self._blobs.put(io.BytesIO(signature))[0] for signature in arrival.signatures]
        told = arrival.manifest
        return Adoption(told.name, arrival.number, arrival.digest, told.content, data, tuple(dict.fromkeys(signatures)))

    def _is_here(self, arrival: Arrival) -> bool:
        with suppress(AdapterNotFound):
            self._catalog.get(arrival.digest)
            return all(self._blobs.has(entry.sha256) for entry in arrival.manifest.files.values())
        return False

    def _gone(self, arrivals: Sequence[Arrival], adoptions: Sequence[Adoption]) -> bool:
        """Whether a sweep took something; asked with the write lock held."""
        needed: set[Digest] = set()
        for arrival, adoption in zip(arrivals, adoptions, strict=True):
            needed |= {adoption.digest, *adoption.signatures}
            needed |= {entry.sha256 for entry in arrival.manifest.files.values()}
        return not all(map(self._blobs.has, needed))


def check(arrivals: Sequence[Arrival], aliases: Sequence[AliasArrival]) -> None:
    """Raise BundleRefused, FactsMalformed, RefInvalid, QueryInvalid or SignatureInvalid; nothing is stored by then."""
    if len(arrivals) > MAX_ARRIVALS:
        raise BundleRefused(f"{len(arrivals)} versions at once; at most {MAX_ARRIVALS} are taken")
    if len({arrival.text for arrival in arrivals}) < len(arrivals) or len({a.digest for a in arrivals}) < len(arrivals):
        raise BundleRefused("the same version comes twice")
    for arrival in arrivals:
        if len(arrival.manifest.canonical()) > MAX_MANIFEST_BYTES:
            raise BundleRefused(f"the manifest of {arrival.text} is too large")
        check_manifest(arrival.manifest)
        arrival.check()
    if len({(each.full_name, each.alias) for each in aliases}) < len(aliases):
        raise BundleRefused("the same alias comes twice")
    for each in aliases:
        Alias.parse(each.alias)
        checked_split([(AdapterRef.parse(f"{each.full_name}"), weight) for number, weight in each.held])
