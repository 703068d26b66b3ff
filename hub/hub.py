"""The hub's facade: push, pull, resolve, tag, and a journal to watch."""

from __future__ import annotations

import fnmatch
import io
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Self

from hub import catalog, location, pull, verify
from hub.adapter_dir import ParsedAdapter, parse_adapter
from hub.base import base_identity
from hub.base_identity import BaseIdentity
from hub.blobs import BlobStore
from hub.errors import AdapterChanged, BaseMismatch, FileNotInVersion, RefInvalid
from hub.fingerprint import known_shapes
from hub.manifest import Manifest
from hub.progress import Progress
from hub.refs import LATEST, AdapterRef, Alias, Digest
from hub.versions import AliasState, Event, Problem, PushResult, Version

__all__ = ["AliasState", "Event", "Hub", "Problem", "PushResult", "Version"]


class Hub:
    """A hub, opened. Methods are safe to call from several threads; any of them may raise HubUnavailable.

    Where a method takes `ref`, an AdapterRef or its text will do; text raises RefInvalid where it is none.
    """

    def __init__(self, blobs: BlobStore, entries: catalog.Catalog) -> None:
        self._blobs = blobs
        self._catalog = entries
        # A version's record never changes.
        self._manifest = lru_cache(maxsize=4096)(partial(verify.read_manifest, blobs))

    @classmethod
    def open(cls, url: str | None = None) -> Self:
        """The hub at `url` ("file:///…" or a path), made where there is none.

        None means the environment's LORAPLEX_HUB, else this user's data directory. Raises HubUnavailable.
        """
        blobs, entries = location.open_parts(url)
        return cls(blobs, entries)

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
        """Store the PEFT LoRA in `directory` as the next version of `ref`'s adapter.

        `ref` names an adapter, and with ":alias" one more alias to move; ":latest" moves to every new version. `base`
        (see `hub.base.locate_base`) is hashed and every tensor checked against it; without it the identity that
        loraplex.json or the config states is recorded. `parents` are the versions this one was made from. Pushing what
        is there already under this name creates nothing.

        Raises a subclass of AdapterRejected, BaseNotFound, BaseMalformed, AdapterNotFound for a parent.
        """
        target = _parsed(ref)
        wanted = [Alias.parse(alias).name for alias in aliases] + _alias_of_target(target)
        parent_digests = [self.resolve(parent).digest for parent in parents]
        located, hashed = base_identity(base, progress=progress) if base is not None else (None, None)
        adapter = parse_adapter(Path(directory), progress=progress)
        identity = _identity(adapter, located)
        shapes = hashed.shapes if hashed else identity.fingerprint and known_shapes(identity.fingerprint)
        if shapes:
            adapter.check_binds(shapes)
        manifest = Manifest.of(
            adapter, name=target.full_name, base=identity, parents=parent_digests, creator=creator,
            created=catalog.now(),
        )  # fmt: skip
        self._store_files(adapter, progress)
        # Known content keeps its manifest; storing that again mends a damaged copy.
        known = self._catalog.find(target.full_name, manifest.content)
        data = known.manifest if known is not None else manifest.canonical()
        digest, _ = self._blobs.put(io.BytesIO(data))
        publication = catalog.Publication(target.full_name, digest, manifest.content, data)
        record, created = self._catalog.publish(publication, wanted)
        return PushResult(self._version(record), created, _warnings(adapter, identity))

    def resolve(self, ref: AdapterRef | str) -> Version:
        """The version `ref` names now; raises AdapterNotFound, VersionNotFound or AliasNotFound."""
        return self._version(self._catalog.resolve(_parsed(ref)))

    def get(self, digest: Digest | str) -> Version:
        """The version with this digest; raises AdapterNotFound."""
        return self._version(self._catalog.get(Digest.parse(digest)))

    def pull(self, ref: AdapterRef | str, directory: Path | str, progress: Progress | None = None) -> Version:
        """Write the version `ref` names into `directory`, which is absent or empty; PEFT loads it from there.

        Every byte is checked, and the directory appears whole or not at all. Raises TargetNotEmpty, BlobCorrupt and
        what `resolve` raises.
        """
        version = self.resolve(ref)
        pull.write_directory(self._blobs, version, Path(directory), progress)
        return version

    def read_file(self, version: Version | Digest | str, filename: str) -> bytes:
        """The bytes of one file of a version (or of the version with this digest), checked against the manifest.

        Raises FileNotInVersion, BlobCorrupt, AdapterNotFound.
        """
        found = version if isinstance(version, Version) else self.get(version)
        entry = found.manifest.files.get(filename)
        if entry is None:
            raise FileNotInVersion(
                f"{found.text} has no file {filename[:80]!a}; it has {', '.join(found.manifest.files)}"
            )
        return verify.read_checked(self._blobs, found, filename)

    def versions(self, pattern: str | None = None) -> list[Version]:
        """All versions whose adapter's name matches the shell pattern ("team/*"; None: all), by name and number."""
        return [
            self._version(record)
            for record in self._catalog.records()
            if pattern is None or fnmatch.fnmatchcase(record.full_name, pattern)
        ]

    def aliases(self, full_name: str) -> dict[str, AliasState]:
        """What the aliases of an adapter hold now, by alias; raises AdapterNotFound, RefInvalid."""
        return self._catalog.aliases(_parsed(full_name).full_name)

    def tag(self, ref: AdapterRef | str, alias: str, expect: int | None = None) -> Version:
        """Point `alias` at the version `ref` names.

        With `expect` only if the alias holds that version number now (0: does not exist yet); AliasMoved otherwise.
        """
        return self._version(self._catalog.tag(_parsed(ref), Alias.parse(alias).name, expect))

    def untag(self, full_name: str, alias: str, expect: int | None = None) -> Version:
        """Remove an alias; the version it held. Raises AliasNotFound, AdapterNotFound, AliasMoved (see `tag`)."""
        return self._version(self._catalog.untag(_parsed(full_name).full_name, Alias.parse(alias).name, expect))

    def events(self, since_seq: int = 0, limit: int = 1000) -> list[Event]:
        """Up to `limit` events after number `since_seq`, oldest first."""
        return self._catalog.events(since_seq, limit)

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
        if ref is not None:
            return verify.check_versions(self._blobs, [self._catalog.resolve(_parsed(ref))], progress)
        problems = [Problem("catalog", None, "CATALOG_DAMAGED", text) for text in self._catalog.check()]
        return problems + verify.check_versions(self._blobs, self._catalog.records(), progress)

    def _version(self, record: catalog.Record) -> Version:
        manifest = self._manifest(record)
        return Version(record.full_name, record.number, record.digest, manifest, manifest.created)

    def _store_files(self, adapter: ParsedAdapter, progress: Progress | None) -> None:
        done = 0
        for file in adapter.files.values():
            with (adapter.directory / file.name).open("rb") as source:
                digest, _ = self._blobs.put(source)
            if digest != file.sha256:
                raise AdapterChanged(f"{file.name} changed while it was being pushed; nothing was published")
            done += file.bytes
            if progress is not None:
                progress("storing", done, adapter.bytes)


def _parsed(ref: AdapterRef | str) -> AdapterRef:
    return AdapterRef.parse(ref) if isinstance(ref, str) else ref


def _alias_of_target(ref: AdapterRef) -> list[str]:
    """The alias that a push to `ref` moves besides "latest"."""
    if not isinstance(ref.selector, Alias):
        raise RefInvalid(f"{ref}: the hub numbers versions itself; push to {ref.full_name}")
    return [] if ref.selector.name == LATEST else [ref.selector.name]


def _identity(adapter: ParsedAdapter, located: BaseIdentity | None) -> BaseIdentity:
    """The base as `--base` found it, else as loraplex.json says, else as PEFT's config names it."""
    recorded = adapter.facts.base
    if located is None:
        return recorded or BaseIdentity(_portable(adapter.config.base_model_name_or_path), adapter.config.revision)
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


def _warnings(adapter: ParsedAdapter, identity: BaseIdentity) -> tuple[str, ...]:
    warnings = []
    if adapter.changes_nothing:
        warnings.append("the adapter changes nothing: its delta is zero everywhere (untrained?)")
    if identity.fingerprint is None:
        name = identity.name or "unknown"
        warnings.append(f"the base ({name}) is unverified: give --base to have every tensor checked against it")
    return tuple(warnings)
