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
class AliasState:
    """What an alias holds just now."""

    version: int
    digest: Digest
    generation: int  # grows with every move, also over an untag; never the same twice


@dataclass(frozen=True)
class Event:
    """One line of the hub's journal."""

    seq: int  # 1, 2, 3, … without gaps
    kind: Literal["push", "tag", "untag"]
    full_name: str
    alias: str | None  # None for "push"
    version: int  # the version pushed, now held by the alias, or held until the untag
    digest: Digest
    time: str  # RFC 3339, UTC

    @property
    def text(self) -> str:
        """The version as people write it: "team/sentiment@3"."""
        return f"{self.full_name}@{self.version}"


@dataclass(frozen=True)
class Problem:
    """Something `verify` found wrong."""

    version: str  # "team/sentiment@3", or "catalog"
    file: str | None
    reason: str  # the `reason` of the error that using it raises
    message: str
