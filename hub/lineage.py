"""Where a version comes from and what came of it, by the parents that manifests name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from hub.refs import Digest
from hub.versions import Version

MAX_VERSIONS: Final = 10_000


@dataclass(frozen=True)
class Ancestor:
    """One step back."""

    digest: Digest
    version: Version | None  # None: not in this hub, or removed
    distance: int  # steps from the version asked for; the shortest way
    children: tuple[Digest, ...]  # through which it was reached


@dataclass(frozen=True)
class Lineage:
    """A version among its relatives."""

    version: Version
    ancestors: tuple[Ancestor, ...]  # nearest first
    children: tuple[Version, ...]  # made directly from it
    complete: bool = True  # False: more than MAX_VERSIONS ancestors, the farthest are left out


def trace(
    version: Version, known: Callable[[Digest], Version | None], children: Callable[[Digest], Iterable[Version]]
) -> Lineage:
    """The lineage of `version` in a hub that answers `known` and `children`."""
    through: dict[Digest, list[Digest]] = {}
    found: dict[Digest, tuple[Version | None, int]] = {version.digest: (version, 0)}
    level, distance = [version], 0
    while level and len(found) <= MAX_VERSIONS:
        distance += 1
        above: list[Version] = []
        for child in level:
            for digest in child.manifest.parents:
                through.setdefault(digest, []).append(child.digest)
                if digest not in found:
                    parent = known(digest)
                    found[digest] = (parent, distance)
                    if parent is not None:
                        above.append(parent)
        level = above
    ancestors = tuple(
        Ancestor(digest, found[digest][0], found[digest][1], tuple(dict.fromkeys(reached)))
        for digest, reached in through.items()
    )
    direct = tuple(child for child in children(version.digest) if version.digest in child.manifest.parents)
    return Lineage(version, tuple(sorted(ancestors, key=lambda a: a.distance)), direct, not level)
