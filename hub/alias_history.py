"""An alias's past, read from its events: what a rollback goes back to, and whether it is what its mover expects.

Moves are a stack. A rollback takes the top off, so two rollbacks in a row go back two moves, and a move after a
rollback starts from there. An untag is a move to nothing and can be rolled back.
"""

from __future__ import annotations

from collections.abc import Iterable

from hub.errors import AliasMoved, NothingToRollBack
from hub.versions import AliasState, Event, Held

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


def check_expected(full_name: str, alias: str, held: AliasState | None, expect: int | None) -> None:
    """Raise AliasMoved where the alias does not hold version `expect` alone (0: it exists; None: nothing is asked)."""
    if expect is None:
        return
    numbers = [target.version for target in held.targets] if held is not None else []
    if numbers == ([expect] if expect else []):
        return
    if len(numbers) > 1:
        holds = f"is split over versions {', '.join(map(str, numbers))}"
    else:
        holds = f"holds version {numbers[0]}" if numbers else "does not exist"
    wanted = f"version {expect}" if expect else "it not to exist"
    raise AliasMoved(f"{full_name}:{alias} {holds}, you expected {wanted}")
