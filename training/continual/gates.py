"""What a stage must keep to be promoted: no earlier task may fall by more than the plan allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

AfterRefusal = Literal["go-on", "stop"]
TEXT = "held-out text"
_SLACK = 1e-9  # scores are means of floats


@dataclass(frozen=True)
class Gates:
    """A plan's gates."""

    max_drop: float = 0.02  # of a task's score, in 0…1
    max_text_drift: float | None = None  # nats a token over the base's; None: not asked
    alias: str = "prod"
    after_refusal: AfterRefusal = "go-on"  # the next stage goes on from the refused one, or the run ends


@dataclass(frozen=True)
class Fall:
    """Why a stage was refused."""

    task: str  # or TEXT
    before: float  # what was served did, at best
    now: float
    allowed: float

    @property
    def text(self) -> str:
        """As people read it."""
        if self.task == TEXT:
            return (
                f"{TEXT} costs {self.now - self.before:.3f} nats a token more than the base's; {self.allowed:g} allowed"
            )
        fell = f"{self.task} fell by {self.before - self.now:.3f}, {self.before:.3f} → {self.now:.3f}"
        return f"{fell}; {self.allowed:g} allowed"


def judge(
    gates: Gates,
    tasks: Sequence[str],
    rows: Sequence[Sequence[float]],
    promoted: Sequence[int],
    text: tuple[float, float] | None = None,
) -> tuple[Fall, ...]:
    """What speaks against promoting the newest stage; empty: nothing.

    `rows` are R up to that stage, `promoted` the earlier stages that were promoted. A task learned earlier is compared
    with the best that any promoted stage did on it, so that small losses cannot add up unseen; where nothing was
    promoted there is nothing to lose. `text` is (base, now) in nats a token.
    """
    now = rows[-1]
    falls = []
    for index in range(len(rows) - 1):
        before = max((rows[stage][index] for stage in promoted), default=None)
        if before is not None and before - now[index] > gates.max_drop + _SLACK:
            falls.append(Fall(tasks[index], before, now[index], gates.max_drop))
    limit = gates.max_text_drift
    if limit is not None and text is not None and text[1] - text[0] > limit + _SLACK:
        falls.append(Fall(TEXT, text[0], text[1], limit))
    return tuple(falls)
