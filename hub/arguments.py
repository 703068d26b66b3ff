"""What callers of the facade give beside references, checked the same way for a hub here and one behind a server."""

from __future__ import annotations

from typing import Final

from hub.errors import FileNotInVersion, QueryInvalid, RefInvalid
from hub.versions import Version

MAX_LEASE_SECONDS: Final = 10 * 365 * 24 * 3600.0


def check_has(version: Version, filename: str) -> None:
    """Raise FileNotInVersion where the version has no such file."""
    if filename not in version.manifest.files:
        raise FileNotInVersion(
            f"{version.text} has no file {filename[:80]!a}; it has {', '.join(version.manifest.files)}"
        )


def checked_holder(text: str) -> str:
    """A lease's holder as it is; raises RefInvalid."""
    if not 0 < len(text) <= 200 or not text.isprintable():
        raise RefInvalid("a holder is a printable line of at most 200 characters")
    return text


def checked_time(seconds: float | None) -> float | None:
    """How long a lease lasts, as it is; raises QueryInvalid."""
    # NaN would be kept as NULL, which is a pin.
    if seconds is not None and not abs(seconds) <= MAX_LEASE_SECONDS:
        raise QueryInvalid("a lease lasts at most ten years; a pin has no end")
    return seconds
