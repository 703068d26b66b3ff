"""Whose word is taken: a version counts as signed when one of the trusted keys signed its digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from hub.errors import SignatureInvalid, SignatureMissing, SignatureUntrusted
from hub.signing import statement
from hub.signing.envelope import Envelope
from hub.signing.keys import TrustedKey, read_trusted_keys
from hub.versions import Version


@dataclass(frozen=True)
class Finding:
    """What is known of one signature of a version."""

    state: Literal["trusted", "unknown", "invalid"]  # "unknown": of a key that was not given, so not checked
    key_id: str | None  # None: the signature does not say
    key: str | None = None  # the trusted key's name
    problem: str | None = None  # of an invalid one


@dataclass(frozen=True)
class TrustPolicy:
    """The keys that are trusted; may be none, then no signature can be checked."""

    keys: tuple[TrustedKey, ...]

    @classmethod
    def read(cls, paths: Sequence[Path]) -> Self:
        """The policy of these public keys' files; raises KeyUnusable."""
        return cls(read_trusted_keys(paths))

    def examine(self, version: Version, signatures: Sequence[bytes]) -> list[Finding]:
        """What is known of each of a version's signatures."""
        return [self._examined(version, signature) for signature in signatures]

    def check(self, version: Version, signatures: Sequence[bytes]) -> list[TrustedKey]:
        """The trusted keys that signed `version`.

        Raises SignatureMissing where nobody signed it, SignatureInvalid where no signature is good and one is broken,
        SignatureUntrusted where all are of other keys.
        """
        if not signatures:
            raise SignatureMissing(f"{version.text} is not signed")
        found = self.examine(version, signatures)
        trusted = {finding.key_id for finding in found if finding.state == "trusted"}
        if trusted:
            return [key for key in self.keys if key.id in trusted]
        broken = next((finding.problem for finding in found if finding.problem is not None), None)
        if broken is not None:
            raise SignatureInvalid(broken)
        others = ", ".join(sorted({f"{finding.key_id}"[:16] for finding in found}))
        raise SignatureUntrusted(f"{version.text} is signed by no trusted key, only by {others}")

    def _examined(self, version: Version, signature: bytes) -> Finding:
        key_id: str | None = None
        try:
            envelope = Envelope.parse(signature)
            key_id = envelope.key_id
            statement.check(envelope.payload, version)
            key = next((key for key in self.keys if key.id == key_id), None)
            if key is None:
                return Finding("unknown", key_id)
            if not key.signed(envelope.signed_bytes, envelope.signature):
                raise SignatureInvalid(f"a signature of {version.text} does not fit the key {key.name} that it names")
        except SignatureInvalid as error:
            return Finding("invalid", key_id, problem=str(error))
        return Finding("trusted", key_id, key.name)
