"""How many prompt tokens a step takes on while answers are being written.

A prompt that joins a step makes everybody's next token late by what it costs. How late is a matter of the machine and
the model, so it is measured: prompts may stretch a step to `STRETCH` times what the answers alone would take. Where
reading the weights is what costs, that is many tokens; where arithmetic does, few.

What prompts cost is a part for there being any and a part for every token. On a GPU the first is the larger by far: a
step of answers is one captured graph, one with prompts hundreds of launches. Whoever pays it takes along as many tokens
as cost the same again, or prompts would need many such steps and make everybody later still.

Where no answer is being written, a step of prompts makes nobody late but him who comes while it runs. Who is alone may
have it; beside others he may not, or a flood whose answers all ended at once would stand in everybody's way.
"""

from __future__ import annotations

from collections import deque
from statistics import median

STRETCH = 2.0
_LEAST = 16  # prompt tokens of a step; fewer would not use what is read for them
_MEMORY = 0.9  # of the running mean of steps without prompts, a step
_STEPS = 16  # with prompts that are remembered
_GROWTH = 4  # times the most tokens of these, at most: further the line through them is not trusted
_ALIKE = 8  # steps of about as many tokens, of which it cannot be learned what each of them costs


class Cost:
    """What prompts added to the last steps that had some, as a line through these: seconds once and a token.

    By medians (Theil and Sen's line): a step that compiled something or met a busy machine does not count for more than
    one.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[int, float]] = deque(maxlen=_STEPS)
        self._line: tuple[float, float] | None = None

    def __bool__(self) -> bool:
        return bool(self._seen)

    @property
    def alike(self) -> bool:
        """Whether many steps had about as many tokens each, so that both parts cannot be told apart."""
        return len(self._seen) >= _ALIKE and not self._pairs()

    def saw(self, tokens: int, seconds: float) -> None:
        """A step's prompts of so many tokens took so long."""
        self._seen.append((tokens, seconds))
        self._line = None

    @property
    def most(self) -> int:
        """Tokens of the largest step remembered."""
        return max(tokens for tokens, _ in self._seen)

    def line(self) -> tuple[float, float]:
        """(seconds once, seconds a token), neither negative."""
        if self._line is None:
            self._line = self._fitted()
        return self._line

    def _fitted(self) -> tuple[float, float]:
        slopes = self._pairs()
        token = max(0.0, median(slopes)) if slopes else 0.0
        once = median(y - token * t for t, y in self._seen) if slopes else 0.0
        if once <= 0.0:
            return 0.0, median(y / t for t, y in self._seen)
        return once, token

    def _pairs(self) -> list[float]:
        """Seconds a token by every two steps that differ enough."""
        seen = list(self._seen)
        return [
            (y - z) / (t - u) for i, (t, y) in enumerate(seen) for u, z in seen[:i] if abs(t - u) >= max(_LEAST, t // 8)
        ]


class Pace:
    """Learns from steps; knows nothing until it has seen some with answers and some with prompts."""

    def __init__(self, stretch: float = STRETCH) -> None:
        self._stretch = stretch
        self._answers: float | None = None  # seconds of a step without prompts
        self._beside = Cost()  # of prompts beside answers
        self._alone = Cost()  # the same from steps of prompts alone: an upper bound

    def saw(self, answers: int, prompt_tokens: int, seconds: float) -> None:
        """A step of `answers` sequences with one token each and of `prompt_tokens` more took so long."""
        if answers and not prompt_tokens:
            before = seconds if self._answers is None else self._answers
            self._answers = _MEMORY * before + (1.0 - _MEMORY) * seconds
        elif answers and prompt_tokens >= _LEAST and self._answers is not None:
            self._beside.saw(prompt_tokens, max(0.0, seconds - self._answers))
        elif not answers and prompt_tokens >= _LEAST:
            self._alone.saw(prompt_tokens, seconds)

    def prompt_tokens(self, answers: int, *, others: bool = False) -> int | None:
        """How many the next step may take beside `answers` sequences; None for any number.

        others: whether more than one line has had requests of late.
        """
        cost = self._beside or self._alone
        if not (answers or others) or self._answers is None or not cost:
            return None
        once, token = cost.line()
        most = _GROWTH * cost.most
        seconds = max((self._stretch - 1.0) * self._answers - once, once)
        tokens = most if seconds >= token * most else int(seconds / token)
        if tokens < _LEAST and cost.alike and cost.most < 2 * _LEAST:
            return 2 * _LEAST  # the least costs too much, and nobody knows yet whether more would cost more
        return max(_LEAST, tokens // _LEAST * _LEAST)
