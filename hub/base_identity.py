"""Which base model an adapter belongs to, as manifests record it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseIdentity:
    """A base's names and, where somebody has hashed it, its fingerprint."""

    name: str | None
    revision: str | None = None
    fingerprint: str | None = None  # "sha256:…"; None: nobody has checked, "unverified"
    quantization: str | None = None  # what the base was loaded as while training: "nf4", "int8", "none"
