"""What may be asked of a weighted alias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from hub.errors import QueryInvalid
from hub.refs import AdapterRef

MAX_WEIGHT: Final = 1_000_000
MAX_TARGETS: Final = 64


def checked_split(targets: Sequence[tuple[AdapterRef, int]]) -> Sequence[tuple[AdapterRef, int]]:
    """`targets`, where they are fit to be an alias's; raises QueryInvalid."""
    if not 1 <= len(targets) <= MAX_TARGETS:
        raise QueryInvalid(f"an alias holds 1 to {MAX_TARGETS} versions, not {len(targets)}")
    for ref, weight in targets:
        if isinstance(weight, bool) or not isinstance(weight, int) or not 1 <= weight <= MAX_WEIGHT:
            raise QueryInvalid(f"{ref}: a weight is a whole number from 1 to {MAX_WEIGHT:,}")
    if len({ref.full_name for ref, _ in targets}) > 1:
        raise QueryInvalid("an alias holds versions of one adapter")
    return targets
