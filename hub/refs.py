"""How adapters are named: text becomes a value here, once, and is a value after that.

    ref      = [namespace "/"] name [selector]
    selector = "@" number | "@sha256:" 64 hex digits | ":" alias        (none: ":latest")
    part     = [a-z0-9][a-z0-9._-]*   at most 64 characters, no ".."    (namespace, name and alias)

ASCII only. A number and a digest never change their meaning; an alias may be moved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from hub.errors import RefInvalid

MAX_PART_CHARS = 64
LATEST = "latest"
_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_NUMBER = re.compile(r"[1-9][0-9]{0,8}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_MAX_REF_CHARS = 2 * MAX_PART_CHARS + 2 + 71  # both parts, "/", "@" and a digest
_GRAMMAR = "write [namespace/]name, then @3, @sha256:… or :alias; parts are lower-case [a-z0-9._-], at most 64 long"


class Digest(str):
    """A SHA-256 written "sha256:<64 lower-case hex digits>"; compares and prints as that text."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """`text` as a digest; raises RefInvalid."""
        if not _DIGEST.fullmatch(text):
            raise RefInvalid(f"{_shown(text)} is no digest: write sha256: and 64 lower-case hex digits")
        return cls(text)

    @classmethod
    def of_hex(cls, hex_digits: str) -> Self:
        """The digest whose 64 hex digits are these; raises RefInvalid."""
        return cls.parse(f"sha256:{hex_digits}")

    @property
    def hex(self) -> str:
        """The 64 hex digits alone."""
        return self[7:]


@dataclass(frozen=True)
class Version:
    """The selector "@3": an immutable number, counted from 1 for each adapter."""

    number: int

    def __str__(self) -> str:
        return f"@{self.number}"


@dataclass(frozen=True)
class Alias:
    """The selector ":prod": a movable name."""

    name: str

    def __str__(self) -> str:
        return f":{self.name}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """`text`, without its colon, as an alias; raises RefInvalid."""
        _check_part(text, "alias", text)
        if text.isdigit():
            raise RefInvalid(f"the alias {text!r} would read like a version; for version {text} write @{text}")
        return cls(text)


@dataclass(frozen=True)
class AdapterRef:
    """A parsed reference; equal references are equal values."""

    namespace: str | None
    name: str
    selector: Version | Digest | Alias = Alias(LATEST)

    @classmethod
    def parse(cls, text: str) -> Self:
        """`text` by the grammar above; raises RefInvalid."""
        if len(text) > _MAX_REF_CHARS:
            raise RefInvalid(f"a reference has at most {_MAX_REF_CHARS} characters, this one has {len(text)}")
        path, at, versioned = text.partition("@")
        colon, aliased = "", ""
        if not at:
            path, colon, aliased = text.partition(":")
        namespace, slash, name = path.rpartition("/")
        if slash:
            _check_part(namespace, "namespace", text)
        _check_part(name, "name", text)
        selector: Version | Digest | Alias = Alias(LATEST)
        if at:
            selector = _parse_version(versioned, text)
        elif colon:
            selector = Alias.parse(aliased)
        return cls(namespace if slash else None, name, selector)

    @property
    def full_name(self) -> str:
        """The adapter without the selector: "team/sentiment"."""
        return self.name if self.namespace is None else f"{self.namespace}/{self.name}"

    def __str__(self) -> str:
        separator = "@" if isinstance(self.selector, Digest) else ""
        return f"{self.full_name}{separator}{self.selector}"


def _parse_version(text: str, whole: str) -> Version | Digest:
    if _NUMBER.fullmatch(text):
        return Version(int(text))
    if text.startswith("sha256:"):
        return Digest.parse(text)
    raise RefInvalid(f"{_shown(whole)}: after @ comes a version number from 1 up, or sha256: and 64 hex digits")


def _check_part(part: str, what: str, whole: str) -> None:
    if not _PART.fullmatch(part) or ".." in part:
        raise RefInvalid(f"{_shown(whole)} is no adapter reference (its {what} is {_shown(part)}): {_GRAMMAR}")


def _shown(text: str) -> str:
    """`text` for a message: ASCII, escaped, cut."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
