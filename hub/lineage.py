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


def relation(a: Lineage, b: Lineage) -> str:
    """How two versions are related, in words: "A is a parent of B", "A and B share team/x@1 (1 and 2 steps back)"."""
    if a.version.digest == b.version.digest:
        return "A and B are the same version"
    back_a = {ancestor.digest: ancestor for ancestor in a.ancestors}
    back_b = {ancestor.digest: ancestor for ancestor in b.ancestors}
    for older, younger, back in (("A", "B", back_b.get(a.version.digest)), ("B", "A", back_a.get(b.version.digest))):
        if back is not None:
            steps = "a parent" if back.distance == 1 else f"an ancestor, {back.distance} steps back,"
            return f"{older} is {steps} of {younger}"
    shared = min(
        back_a.keys() & back_b.keys(), key=lambda d: (back_a[d].distance + back_b[d].distance, d), default=None
    )
    if shared is None:
        return "A and B have no recorded ancestor in common"
    version = back_a[shared].version
    name = version.text if version is not None else shared
    return f"A and B come from {name} ({back_a[shared].distance} and {back_b[shared].distance} steps back)"
