"""The step behind the one that a device computes, launched before anybody knows what that one chose."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from torch import Tensor

from server.engine.front_door import FrontDoor
from server.engine.scheduler import Scheduler, Share
from server.engine.sequence import Sequence

Ahead = Callable[[Seq[Sequence], Tensor], bool]
"""Launches the step after the one that ran last, for these of its sequences, by the tokens [S] on the device that it
chose for all of them; whether it did. Whoever is asked to compute them next has done so then."""


class Foresight:
    """Steps that need no schedule: those of the same sequences, one token on.

    Whom a token ends has then computed one more in vain. Who waits, waits one step longer, but never for two such steps
    in turn.
    """

    def __init__(self, door: FrontDoor, scheduler: Scheduler, launch: Ahead) -> None:
        self._door = door
        self._scheduler = scheduler
        self._launch = launch
        self._foreseen: list[Sequence] = []  # whose next step was launched already
        self._scheduled = True  # the step that runs; it was not foreseen
        self.choosing: Seq[Share] = ()  # the shares of the step that runs, where each of them gets a token

    def shares(self) -> list[Share]:
        """The step that was launched already, empty where none was."""
        foreseen, self._foreseen = self._foreseen, []
        shares = self._scheduler.again(foreseen)
        self._scheduled = not shares
        return shares

    def look(self, tokens: Tensor) -> None:
        """Launch the step behind the one that runs, where it can be foreseen; tokens: [S] on the device, what that one
        will have chosen."""
        waits = self._door.crowded or len(self._scheduler.waiting) > 0
        if (waits and not self._scheduled) or any(share.tokens > 1 for share in self.choosing):
            return
        going_on = self._scheduler.foresee([share.sequence for share in self.choosing])
        if going_on and self._launch(going_on, tokens):
            self._foreseen = going_on
