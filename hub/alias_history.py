"""An alias's past, read from its events: what a rollback goes back to.

Moves are a stack. A rollback takes the top off, so two rollbacks in a row go back two moves, and a move after a
rollback starts from there. An untag is a move to nothing and can be rolled back.
"""

from __future__ import annotations

from collections.abc import Iterable

from hub.errors import NothingToRollBack
from hub.versions import Event, Held

ROLLBACK = "rollback"


def before_now(alias: str, events: Iterable[Event]) -> Held:
    """What the alias held before its last move; `events` are its own, oldest first.

    Raises NothingToRollBack where it held nothing.
    """
    stack: list[Held | None] = []
    for event in events:
        if event.note == ROLLBACK and len(stack) > 1:
            stack.pop()
        else:
            stack.append(event.after)
    if len(stack) < 2 or (wanted := stack[-2]) is None:
        raise NothingToRollBack(f"{alias} held nothing before what it holds now")
    return wanted
