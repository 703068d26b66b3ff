"""The hub's facade: push, pull, resolve, tag, and a journal to watch."""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from hub import adopting, catalog, fsck, location, publishing, pull, signature_store, verify
from hub.arguments import check_has, checked_holder, checked_time
from hub.base import base_identity
from hub.base_identity import BaseIdentity
from hub.blobs import BlobStore
from hub.errors import AdapterNotFound, AliasMoved, BlobCorrupt
from hub.evaluations import Evaluations, KeptEvaluations
from hub.fingerprint import known_shapes
from hub.gate import Gate, Promotion
from hub.gate_evaluation import Scores
from hub.lineage import Lineage, relation, trace
from hub.manifest import Manifest
from hub.parsing import Parsed, parse_directory
from hub.profile import PROFILE_FILE
from hub.progress import Progress
from hub.publishing import identity_of, pushed_aliases, warnings_of
from hub.refs import AdapterRef, Alias, Digest
from hub.search import Page, Query
from hub.splitting import checked_split
from hub.sweep import GRACE_SECONDS, RETENTION_SECONDS, collect
from hub.versions import AliasState, Event, Lease, Problem, PushResult, Swept, Version

if TYPE_CHECKING:
    import sqlalchemy as sa

    from hub.diff import Diff
    from hub.facade import HubFacade

__all__ = ["AliasState", "Event", "Hub", "Lease", "Problem", "PushResult", "Swept", "Version"]


class Hub(signature_store.KeptSignatures, KeptEvaluations, adopting.AdoptedVersions):
    """A hub, opened. Methods are safe to call from several threads; any of them may raise HubUnavailable.

    Where a method takes `ref`, an AdapterRef or its text will do; text raises RefInvalid where it is none.
    """

    def __init__(
        self,
        blobs: BlobStore,
        entries: catalog.Catalog,
        directory: Path | None = None,
        evaluations: Evaluations | None = None,
    ) -> None:
        """`directory`: the hub's own, where it has one, with a profile; `evaluations` None: there are none."""
        self._blobs = blobs
        self._catalog = entries
        self._directory = directory
        self._evaluations = evaluations
        # What pushes must keep to, see `hub.profile`; it need not be there, and is read every time.
        self.profile_file = directory / PROFILE_FILE if directory is not None else None
        # A version's record never changes.
        self._manifest = lru_cache(maxsize=4096)(partial(verify.read_manifest, blobs))

    @classmethod
    def open(cls, url: str | None = None) -> Self:
        """The hub at `url`, made where there is none: "file:///…", a path or "postgresql://…?blobs=…".

        None means the environment's LORAPLEX_HUB, else this user's data directory. Raises HubUnavailable.
        """
        return cls(*location.open_parts(url), *_beside(url))

    @classmethod
    def open_existing(cls, url: str | None = None) -> Self:
        """The hub at `url`, which is there; in a directory that cannot be written it is open for reading.

        Raises HubNotFound where there is none, HubUnavailable.
        """
        return cls(*location.open_existing(url), *_beside(url))

    def acting_as(self, actor: str | None) -> Hub:
        """This hub; what is written through the result is written by `actor`. Close only one of the two."""
        other = Hub(self._blobs, self._catalog.acting_as(actor), self._directory, self._evaluations)
        other.profile_file = self.profile_file
        return other

    def close(self) -> None:
        """Give back the connections."""
        self._catalog.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def push(
        self,
        directory: Path | str,
        ref: AdapterRef | str,
        *,
        base: str | None = None,
        aliases: Sequence[str] = (),
        parents: Sequence[AdapterRef | str] = (),
        creator: str | None = None,
        progress: Progress | None = None,
    ) -> PushResult:
        """Store the PEFT LoRA (or the whole model) in `directory` as the next version of `ref`'s adapter.

        `ref` names an adapter, and with ":alias" one more alias to move; ":latest" moves to every new version. `base`
        (see `hub.base.locate_base`) is hashed and every tensor checked against it; without it the identity that
        loraplex.json or the config states is recorded. `parents` are the versions this one was made from. Pushing what
        is there already under this name creates nothing.

        Raises a subclass of AdapterRejected, BaseNotFound, BaseMalformed, AdapterNotFound for a parent.
        """
        self._catalog.check_writable()
        target = _parsed(ref)
        wanted = [Alias.parse(alias).name for alias in aliases]
        pushed_aliases(target)  # refuses a number before anything is read
        parent_digests = [self.resolve(parent).digest for parent in parents]
        located, hashed = base_identity(base, progress=progress) if base is not None else (None, None)
        adapter = parse_directory(Path(directory), progress=progress)
        return self.publish(
            adapter, target, located=located, shapes=hashed.shapes if hashed else None, aliases=wanted,
            parents=parent_digests, creator=creator, progress=progress,
        )  # fmt: skip

    def publish(
        self,
        adapter: Parsed,
        ref: AdapterRef,
        *,
        located: BaseIdentity | None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        aliases: Sequence[str] = (),
        parents: Sequence[Digest] = (),
        creator: str | None = None,
        progress: Progress | None = None,
        stored: publishing.Stored = publishing.copied,
    ) -> PushResult:
        """The second half of `push`: store an adapter that was read, whose base was `located` (None: not given).

        `shapes` are those of the base's tensors; without them those that this machine knows of it are used. `stored`:
        whether the files are copied, or kept themselves.
        """
        wanted = [*aliases, *pushed_aliases(ref)]
        identity = identity_of(adapter, located)
        if shapes is None and identity.fingerprint:
            shapes = known_shapes(identity.fingerprint)
        if shapes:
            adapter.check_binds(shapes)
        manifest = Manifest.of(
            adapter, name=ref.full_name, base=identity, parents=parents, creator=creator, created=catalog.now(),
        )  # fmt: skip
        publishing.check_manifest(manifest)
        publishing.check_profile(self.profile_file, manifest)
        record, outcome = publishing.publish(self._blobs, self._catalog, adapter, manifest, wanted, progress, stored)
        warnings = (*publishing.warnings_about(record, outcome), *warnings_of(adapter, identity))
        return PushResult(self._version(record), outcome == "created", warnings)

    def resolve(self, ref: AdapterRef | str, key: str | None = None) -> Version:
        """The version `ref` names now; raises AdapterNotFound, VersionNotFound or AliasNotFound.

        Where an alias is split over several versions, `key` (a user, a session) always gets the same one while the
        weights stay, see `hub.canary`; without a key it is the heaviest.
        """
        return self._version(self._catalog.resolve(_parsed(ref), key))

    def get(self, digest: Digest | str) -> Version:
        """The version with this digest; raises AdapterNotFound."""
        return self._version(self._catalog.get(Digest.parse(digest)))

    def pull(self, ref: AdapterRef | str, directory: Path | str, progress: Progress | None = None) -> Version:
        """Write the version `ref` names into `directory`, which is absent or empty; PEFT loads it from there.

        Every byte is checked, and the directory appears whole or not at all, or a volume is filled (see `hub.pull`).
        Raises TargetNotEmpty, BlobCorrupt and what `resolve` raises.
        """
        version = self.resolve(ref)
        try:
            pull.write_directory(self._blobs, version, Path(directory), progress)
        except BlobCorrupt:
            self.get(version.digest)  # removed and swept meanwhile: then that is what to say
            raise
        return version

    def read_file(self, version: Version | Digest | str, filename: str) -> bytes:
        """The bytes of one file of a version (or of the version with this digest), checked against the manifest.

        Raises FileNotInVersion, BlobCorrupt, AdapterNotFound.
        """
        found = version if isinstance(version, Version) else self.get(version)
        check_has(found, filename)
        return verify.read_checked(self._blobs, found, filename)

    def open_file(self, version: Version, filename: str) -> BinaryIO:
        """One file of a version to read from, for the caller to close; whoever uses the bytes checks them first.

        Raises FileNotInVersion, BlobNotFound.
        """
        check_has(version, filename)
        return self._blobs.open(version.manifest.files[filename].sha256)

    @property
    def storage(self) -> BlobStore:
        """Where the bytes are; for the shared server, which hands them on in parts."""
        return self._blobs

    @property
    def entries(self) -> catalog.Catalog:
        """What is in the hub; for the shared server, which hands manifests on as they are stored."""
        return self._catalog

    @property
    def database(self) -> sa.Engine:
        """Where the catalog is; for the shared server, whose tokens lie beside it."""
        return self._catalog.engine

    def holds_file(self, full_name: str, digest: Digest) -> bool:
        """Whether a version of this adapter has a file with this digest, and its bytes are stored."""
        return self._catalog.names_file(full_name, digest) and self._blobs.has(digest)

    def diff(self, a: AdapterRef | str, b: AdapterRef | str) -> Diff:
        """How the version `b` names differs from the one `a` names; raises BlobCorrupt and what `resolve` raises."""
        from hub.diff import compare  # needs numpy's linear algebra, which only this method does

        first, second = self.resolve(a), self.resolve(b)
        return compare(self._blobs, first, second, self._relation(first, second))

    def versions(self, pattern: str | None = None) -> list[Version]:
        """All versions whose adapter's name matches the shell pattern ("team/*"; None: all), by name and number."""
        return [
            self._version(record)
            for record in self._catalog.records()
            if record.removed is None and (pattern is None or fnmatch.fnmatchcase(record.full_name, pattern))
        ]

    def search(self, query: Query) -> Page:
        """The versions that meet a query, a page at a time, by name and number."""
        records, aliases, more = self._catalog.search(query)
        return Page(tuple(map(self._version, records)), aliases, more)

    def lineage(self, ref: AdapterRef | str) -> Lineage:
        """What a version was made from, back to the first, and what was made from it; raises what `resolve` does."""
        version = self.resolve(ref)
        return trace(version, self._known, lambda digest: map(self._version, self._catalog.children(digest)))

    def aliases(self, full_name: str) -> dict[str, AliasState]:
        """What the aliases of an adapter hold now, by alias; raises AdapterNotFound, RefInvalid."""
        return self._catalog.aliases(_parsed(full_name).full_name)

    def tag(self, ref: AdapterRef | str, alias: str, expect: int | None = None) -> Version:
        """Point `alias` at the version `ref` names.

        With `expect` only if the alias holds that version number now (0: does not exist yet); AliasMoved otherwise.
        """
        target = _parsed(ref)
        state = self._catalog.tag([(target, 1)], Alias.parse(alias).name, expect)
        return self.get(state.digest)

    def split(
        self, targets: Sequence[tuple[AdapterRef | str, int]], alias: str, expect: int | None = None
    ) -> AliasState:
        """Point `alias` at several versions of one adapter with weights from 1 to 1,000,000 (a canary); see `resolve`.

        Raises QueryInvalid for weights out of range, references to several adapters or the same version twice; else
        as `tag`.
        """
        wanted = checked_split([(_parsed(ref), weight) for ref, weight in targets])
        return self._catalog.tag(wanted, Alias.parse(alias).name, expect)

    def promote(self, ref: AdapterRef | str, alias: str, gate: Gate, scores: Scores | None = None) -> Promotion:
        """Point `alias` at the version `ref` names, provided its metrics meet `gate`.

        They are those it was pushed with, those of its evaluations ("task.metric"), and `scores`.

        Comparisons with what the alias holds are made with what it holds at the moment it moves: where it moved
        meanwhile, also while `scores` were measured, AliasMoved. Raises GateRefused, naming every number that failed,
        and what `resolve` raises.
        """
        target, name = _parsed(ref), Alias.parse(alias).name
        version = self.resolve(target)
        held = self.aliases(version.full_name).get(name)
        current = self.get(held.digest) if held is not None else None
        compares = bool(gate.no_lower or gate.no_higher)
        if scores is not None and compares and scores.current_digest != (current.digest if current else None):
            raise AliasMoved(f"{version.full_name}:{name} was moved while the evaluation ran")
        recorded = self._evaluations.recorded(version, current) if self._evaluations is not None else None
        passed = gate.check(version, current, scores, recorded)
        exact = replace(target, selector=version.digest)
        note = f"promote: {'; '.join([*passed, scores.source] if scores else passed)}"[:500]
        self._catalog.tag([(exact, 1)], name, None, generation=held.generation if held else 0, note=note)
        return Promotion(version, current, passed)

    def rollback(self, full_name: str, alias: str, expect: int | None = None) -> AliasState:
        """Give `alias` back what it held before its last move; again: the move before that.

        Raises NothingToRollBack, VersionNotFound where what it held is removed, AliasMoved (see `tag`), AliasNotFound.
        """
        return self._catalog.rollback(_parsed(full_name).full_name, Alias.parse(alias).name, expect)

    def untag(self, full_name: str, alias: str, expect: int | None = None) -> Version:
        """Remove an alias; the version it held. Raises AliasNotFound, AdapterNotFound, AliasMoved (see `tag`)."""
        return self._version(self._catalog.untag(_parsed(full_name).full_name, Alias.parse(alias).name, expect))

    def remove(self, ref: AdapterRef | str) -> Version:
        """Mark the version `ref` names as removed: it resolves no more, its bytes stay until a sweep takes them.

        Raises VersionHeld where an alias, a pin or a lease holds it, and what `resolve` raises.
        """
        return self._version(self._catalog.remove(_parsed(ref)))

    def restore(self, ref: AdapterRef | str) -> Version:
        """Take a removal back; `ref` has a number or a digest. Raises NotRestorable, VersionNotFound, RefInvalid."""
        return self._version(self._catalog.restore(_parsed(ref)))

    def sweep(
        self,
        *,
        retention_seconds: float = RETENTION_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        dry_run: bool = False,
    ) -> Swept:
        """Give back what nothing needs; see `hub.sweep`. With `dry_run` say what that would be."""
        return collect(self._blobs, self._catalog, self._evaluations, retention_seconds, grace_seconds, dry_run=dry_run)

    def lease(self, ref: AdapterRef | str, holder: str, seconds: float | None = None) -> Lease:
        """Keep the version `ref` names from being removed, for `seconds` from now or (None) until released: a pin.

        Called again by the same holder it sets the end anew. Raises what `resolve` raises, RefInvalid for a holder
        that is no short printable line, QueryInvalid for a time that is no number or longer than ten years.
        """
        return self._catalog.lease(_parsed(ref), checked_holder(holder), checked_time(seconds))

    def release(self, ref: AdapterRef | str, holder: str) -> None:
        """Take a lease or pin back; nothing happens where there is none. Raises what `resolve` raises."""
        self._catalog.release(_parsed(ref), checked_holder(holder))

    def leases(self, full_name: str | None = None) -> list[Lease]:
        """The leases and pins that hold versions now, of one adapter or (None) of all."""
        return self._catalog.leases(_parsed(full_name).full_name if full_name is not None else None)

    def events(self, since_seq: int = 0, limit: int = 1000, full_name: str | None = None) -> list[Event]:
        """Up to `limit` events after number `since_seq`, oldest first; of one adapter or (None) of all."""
        return self._catalog.events(since_seq, limit, _parsed(full_name).full_name if full_name is not None else None)

    def last_seq(self) -> int:
        """The newest event's number; 0 in a new hub."""
        return self._catalog.last_seq()

    def watch(self, since_seq: int, stop: threading.Event, poll_seconds: float = 0.2) -> Iterator[Event]:
        """Events after number `since_seq` as they come, in order, none twice, until `stop` is set."""
        while not stop.is_set():
            events = self.events(since_seq)
            for event in events:
                yield event
                since_seq = event.seq
                if stop.is_set():
                    return
            if not events:
                stop.wait(poll_seconds)

    def verify(self, ref: AdapterRef | str | None = None, progress: Progress | None = None) -> list[Problem]:
        """Read and hash everything `ref` names (None: the whole hub, catalog included); what is wrong with it."""
        problems = []
        if ref is not None:
            records = [self._catalog.resolve(_parsed(ref))]
        else:
            problems = [Problem("catalog", None, "CATALOG_DAMAGED", text) for text in self._catalog.check()]
            records = self._catalog.records()
        problems += verify.check_versions(self._blobs, records, progress)
        return problems + signature_store.problems(self._blobs, self._catalog, records)

    def fsck(self, progress: Progress | None = None) -> list[Problem]:
        """Compare the catalog with the journal and the blobs' presence; what is wrong. `verify` reads the bytes."""
        problems = fsck.check(self._blobs, self._catalog, progress)
        return problems + (self._evaluations.problems() if self._evaluations is not None else [])

    def _relation(self, a: Version, b: Version) -> str:
        return relation(self.lineage(_exact(a)), self.lineage(_exact(b)))

    def _known(self, digest: Digest) -> Version | None:
        try:
            return self.get(digest)
        except AdapterNotFound:
            return None

    def _version(self, record: catalog.Record) -> Version:
        manifest = self._manifest(record)
        return Version(record.full_name, record.number, record.digest, manifest, manifest.created)


def _beside(url: str | None) -> tuple[Path | None, Evaluations]:
    """The directory of the hub at `url`, where it has one, and its evaluations."""
    place = location.Place.parse(url)
    return place.directory, Evaluations.at(place)


def _exact(version: Version) -> AdapterRef:
    return replace(AdapterRef.parse(version.full_name), selector=version.digest)


def _parsed(ref: AdapterRef | str) -> AdapterRef:
    return AdapterRef.parse(ref) if isinstance(ref, str) else ref


def _keeps_the_contract(hub: Hub) -> HubFacade:
    """Checked by mypy, never called."""
    return hub
