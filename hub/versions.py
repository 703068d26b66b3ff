"""The hub's nouns, as the facade hands them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hub.manifest import Manifest
from hub.refs import Digest


@dataclass(frozen=True)
class Version:
    """One immutable version of an adapter."""

    full_name: str  # "team/sentiment"
    number: int  # counted from 1
    digest: Digest  # of the manifest; the version's identity
    manifest: Manifest
    created: str  # RFC 3339, UTC

    @property
    def text(self) -> str:
        """As people write it: "team/sentiment@3"."""
        return f"{self.full_name}@{self.number}"


@dataclass(frozen=True)
class PushResult:
    """What a push did."""

    version: Version
    created: bool  # False: the same content was there already, as `version`
    warnings: tuple[str, ...] = ()  # for people: sound, but perhaps not what was meant


@dataclass(frozen=True)
class Target:
    """One version that an alias holds, and its share."""

    version: int
    digest: Digest
    weight: int  # from 1 up; the share is weight / the sum of the alias's weights


@dataclass(frozen=True)
class AliasState:
    """What an alias holds just now."""

    version: int  # of several the heaviest, of equals the oldest: what resolves without a key
    digest: Digest
    generation: int  # grows with every move, also over an untag; never the same twice
    targets: tuple[Target, ...] = ()  # by number; several: a canary, see `hub.canary`

    def holds(self, number: int) -> bool:
        """Whether this version is what it holds, or some of it."""
        return any(target.version == number for target in self.targets)


Held = tuple[tuple[int, int], ...]  # what an alias holds, as the journal writes it: (number, weight), by number
EventKind = Literal["push", "tag", "untag", "rm", "restore", "purge", "pin", "unpin", "sign"]


@dataclass(frozen=True)
class Event:
    """One line of the hub's journal: who did what, when, and from what to what."""

    seq: int  # 1, 2, 3, … without gaps
    kind: EventKind
    full_name: str
    alias: str | None  # for "tag" and "untag"
    version: int  # the version pushed, removed, …, now held by the alias (the heaviest), or held until the untag
    digest: Digest
    time: str  # RFC 3339, UTC
    actor: str | None = None  # who; None where an older release wrote it
    before: Held | None = None  # what the alias held; None: it was not there
    after: Held | None = None  # what it holds now; None: it is gone
    note: str | None = None  # "rollback", "promote: …", a pin's holder, a signature's digest
    batch: int = 0  # seq of the first event of the same write

    @property
    def text(self) -> str:
        """The version as people write it: "team/sentiment@3"."""
        return f"{self.full_name}@{self.version}"


@dataclass(frozen=True)
class Lease:
    """Somebody keeps a version from being removed."""

    full_name: str
    version: int
    holder: str
    expires: float | None  # Unix time; None: a pin, until it is taken back


@dataclass(frozen=True)
class Swept:
    """What `gc` gave back, or would."""

    purged: tuple[str, ...]  # versions gone for good: "team/sentiment@3"
    blobs: int
    leftovers: int  # half-written blobs of pushes that died
    bytes: int  # of both


@dataclass(frozen=True)
class Problem:
    """Something `verify` or `fsck` found wrong."""

    version: str  # "team/sentiment@3", or "catalog"
    file: str | None
    reason: str  # the `reason` of the error that using it raises
    message: str
