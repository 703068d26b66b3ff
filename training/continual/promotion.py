"""How a run moves its alias: from what it promoted last, never from what somebody else has put there."""

from __future__ import annotations

from hub.errors import AliasMoved
from hub.facade import HubFacade
from training.continual.record import RunRecord


def promote(hub: HubFacade, name: str, number: int, alias: str, expected: int) -> tuple[str, ...]:
    """Move the alias from the version that this run promoted last (0: none yet); why it could not be moved, if so.

    Compare-and-swap: what somebody else promoted meanwhile is theirs, and is not overwritten.
    """
    held = hub.aliases(name).get(alias)
    if held is not None and held.version == number and len(held.targets) <= 1:
        return ()  # by this run, before it was stopped
    try:
        hub.tag(f"{name}@{number}", alias, expect=expected)
    except AliasMoved as error:
        return (f"somebody else moved the alias: {error}",)
    return ()


def last_number(record: RunRecord, name: str) -> int:
    """The version of `name` that this run promoted last, 0 before the first."""
    numbers = [
        int(s.version.rpartition("@")[2]) for s in record.stages if s.promoted and s.version.startswith(f"{name}@")
    ]
    return numbers[-1] if numbers else 0
