"""Which version of a weighted alias a key gets: one pure function, the same for hub, server and client.

    point = floor(u64(SHA-256(name ":" alias NUL key)[:8]) · total / 2^64)      0 <= point < total, the weights' sum

Targets are laid end to end in the order of their numbers, each as long as its weight; the key gets the one that holds
its point. A key stays where it is while the weights stay, and when the newest version's share grows by n of the total,
n of the total move to it and nobody else moves. Integers only, so that any language agrees.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from hub.versions import Target


def pick(targets: Sequence[Target], full_name: str, alias: str, key: str) -> Target:
    """The target of `full_name:alias` that `key` gets."""
    ordered = sorted(targets, key=lambda target: target.version)
    total = sum(target.weight for target in ordered)
    digest = hashlib.sha256(f"{full_name}:{alias}\0{key}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") * total >> 64
    for target in ordered:
        point -= target.weight
        if point < 0:
            return target
    raise AssertionError("the point lies inside the total")


def primary(targets: Sequence[Target]) -> Target:
    """The target without a key: the heaviest, of equals the oldest."""
    return min(targets, key=lambda target: (-target.weight, target.version))
