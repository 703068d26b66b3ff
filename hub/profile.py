"""What the servers behind a hub can take, checked at every push: a small TOML file beside the catalog.

    max_rank = 64                        # of any module
    targets = ["q_proj", "v_proj"]       # modules that may be trained, by the last part of their names
    features = ["rslora"]                # besides plain LoRA: dora, modules_to_save, … ([]: none)
    dtypes = ["BF16"]
    max_bytes = "200 MB"                 # of all files of an adapter
    bases = ["smollm2-135m"]             # names or fingerprints
    verified_base = true                 # somebody has hashed the base that the adapter was checked against

    [for."team/*"]                       # instead of the keys above, for these adapters; the first that matches counts
    max_rank = 128

Every key is optional. It holds for adapters, not for whole models, and for what is pushed or imported from then on.
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

from hub.byte_size import parse_size
from hub.errors import ProfileMalformed, ProfileRefused
from hub.manifest import Manifest

PROFILE_FILE: Final = "profile.toml"
MAX_PROFILE_BYTES: Final = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """What an adapter must keep to; None: anything."""

    max_rank: int | None = None
    targets: tuple[str, ...] | None = None
    features: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    max_bytes: int | None = None
    bases: tuple[str, ...] | None = None
    verified_base: bool = False

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> Self:
        """The limits in a table; raises ValueError."""
        known = {each.name for each in fields(cls)}
        if strange := [key for key in value if key not in known]:
            raise ValueError(f"has the unknown key {strange[0][:60]!a}; known: {', '.join(sorted(known))}, for")
        parsed: dict[str, Any] = {key: _READERS[key](key, item) for key, item in value.items()}
        return cls(**parsed)

    def broken_by(self, manifest: Manifest) -> list[str]:
        """What of the adapter is beyond them, each with the number or name and the limit."""
        lora, base = manifest.lora, manifest.base
        size = sum(entry.bytes for entry in manifest.files.values())
        broken = []
        if self.max_rank is not None and lora.max_rank > self.max_rank:
            broken.append(f"rank {lora.max_rank}, at most {self.max_rank} is served")
        for what, has, allowed in (
            ("targets", lora.targets, self.targets),
            ("features", lora.features, self.features),
            ("dtypes", lora.dtypes, self.dtypes),
        ):
            beyond = [] if allowed is None else [name for name in has if name not in allowed]
            if beyond:
                broken.append(f"{what} {', '.join(beyond)}, served are {', '.join(allowed or ()) or 'none'}")
        if self.max_bytes is not None and size > self.max_bytes:
            broken.append(f"{size:,} bytes, at most {self.max_bytes:,} are served")
        if self.bases is not None and not {base.name, base.fingerprint} & set(self.bases):
            broken.append(f"the base {base.name or 'unknown'}, served is {', '.join(self.bases)}")
        if self.verified_base and base.fingerprint is None:
            broken.append("the base is unverified: give --base")
        return broken


@dataclass(frozen=True)
class Profile:
    """The limits of every adapter's name."""

    limits: Limits = Limits()
    names: Mapping[str, Limits] = field(default_factory=dict)  # by shell pattern, in their order

    @classmethod
    def read(cls, file: Path) -> Self:
        """The profile in a file, no limits where there is no file; raises ProfileMalformed."""
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise ProfileMalformed(f"the hub's {file.name} cannot be read: {error.strerror}") from error
        return cls.parse(data, f"the hub's {file.name}")

    @classmethod
    def parse(cls, data: bytes, name: str = PROFILE_FILE) -> Self:
        """The profile in TOML; raises ProfileMalformed."""
        try:
            if len(data) > MAX_PROFILE_BYTES:
                raise ValueError(f"has {len(data)} bytes, the limit is {MAX_PROFILE_BYTES}")
            value = tomllib.loads(data.decode("utf-8"))
            sections = value.pop("for", {})
            if not isinstance(sections, dict) or not all(isinstance(item, dict) for item in sections.values()):
                raise ValueError("for: is no table of names, each with limits")
            return cls(Limits.parse(value), {pattern: Limits.parse(item) for pattern, item in sections.items()})
        except ValueError as error:
            raise ProfileMalformed(f"{name}: {error}") from error

    def check(self, manifest: Manifest) -> None:
        """Raise ProfileRefused, naming all that is beyond the limits."""
        if manifest.model is not None:
            return
        matching = (found for pattern, found in self.names.items() if fnmatch.fnmatchcase(manifest.name, pattern))
        if broken := next(matching, self.limits).broken_by(manifest):
            raise ProfileRefused(f"{manifest.name} is not what this hub's servers take: {'; '.join(broken)}")


def _count(key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is no positive number")
    return value


def _bytes(key: str, value: Any) -> int:
    if not isinstance(value, str):
        return _count(key, value)
    try:
        size = parse_size(value)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return _count(key, size)


def _names(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} is no list of names")
    return tuple(value)


def _yes(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key} is neither true nor false")
    return value


_READERS: Final[Mapping[str, Callable[[str, Any], Any]]] = {
    "max_rank": _count,
    "targets": _names,
    "features": _names,
    "dtypes": _names,
    "max_bytes": _bytes,
    "bases": _names,
    "verified_base": _yes,
}
