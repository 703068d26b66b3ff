"""Versions that come from another hub, with the identity and, where it is free, the number that they have there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from hub.errors import BaseMismatch, BundleRefused, HubError
from hub.manifest import Manifest
from hub.parsing import Parsed, parse_directory
from hub.refs import AdapterRef, Digest
from hub.signing.envelope import check_signature
from hub.versions import Held, Version

MAX_ARRIVALS: Final = 10_000  # in one import
MAX_NUMBER: Final = 900_000_000  # references have nine digits
Outcome = Literal["imported", "known", "restored"]  # "restored": it was removed here, and is back


@dataclass(frozen=True)
class Arrival:
    """One version on its way in."""

    number: int  # in the hub it comes from
    manifest: Manifest
    signatures: tuple[bytes, ...] = ()

    @property
    def digest(self) -> Digest:
        """Its identity, there and here."""
        return self.manifest.digest

    @property
    def text(self) -> str:
        """As people write it there: "team/sentiment@3"."""
        return f"{self.manifest.name}@{self.number}"

    def check(self) -> None:
        """Raise RefInvalid, BundleRefused or SignatureInvalid where this can be no version."""
        if not 1 <= self.number <= MAX_NUMBER:
            raise BundleRefused(f"{self.manifest.name}: {self.number} is no version's number")
        AdapterRef.parse(self.text)
        version = Version(self.manifest.name, self.number, self.digest, self.manifest, self.manifest.created)
        for signature in self.signatures:
            check_signature(signature, version)


@dataclass(frozen=True)
class AliasArrival:
    """An alias as it is in the hub it comes from; all its versions arrive with it, or are here."""

    full_name: str
    alias: str
    held: Held  # by the numbers there


@dataclass(frozen=True)
class Adopted:
    """What became of an arrival."""

    version: Version  # as it is here
    number: int  # the one it came with
    outcome: Outcome
    signatures_added: int


# A directory with the files of an arrival and nothing else, while inside.
LayOut = Callable[[Arrival], AbstractContextManager[Path]]


def read_as_told(arrival: Arrival, directory: Path) -> Parsed:
    """Read the files as any adapter is read, and check that the manifest tells nothing of them that is not so.

    Raises a subclass of AdapterRejected, without the directory in its message, or BundleRefused.
    """
    try:
        adapter = parse_directory(directory)
    except HubError as error:
        text = str(error).replace(f"{directory}/", "").replace(str(directory), arrival.text)
        raise type(error)(f"{arrival.text}: {text}") from error
    told, recorded = arrival.manifest, adapter.facts.base
    if recorded is not None and recorded.fingerprint not in (None, told.base.fingerprint):
        raise BaseMismatch(f"{arrival.text}: the adapter was trained on another base than its manifest names")
    made = Manifest.of(
        adapter, name=told.name, base=told.base, parents=told.parents, creator=told.creator, created=told.created
    )
    if made.canonical() != told.canonical():
        mine, theirs = made.to_json(), told.to_json()
        wrong = ", ".join(sorted(key for key in mine if mine[key] != theirs[key])) or "its form"
        raise BundleRefused(f"the manifest of {arrival.text} does not tell what its files are: {wrong}")
    return adapter
