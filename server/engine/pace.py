"""How many prompt tokens a step takes on while answers are being written.

A prompt that joins a step makes everybody's next token late by what it costs. How late is a matter of the machine and
the model, so it is measured: prompts may stretch a step to `STRETCH` times what the answers alone would take. Where
reading the weights is what costs, that is many tokens; where arithmetic does, few.

Where no answer is being written, a step of prompts makes nobody late but him who comes while it runs. Who is alone may
have it; beside others he may not, or a flood whose answers all ended at once would stand in everybody's way.
"""

from __future__ import annotations

STRETCH = 2.0
_LEAST = 16  # prompt tokens of a step; fewer would not use what is read for them
_MEMORY = 0.9  # of the running means, a step


class Pace:
    """Learns from steps; knows nothing until it has seen some with answers and some with prompts."""

    def __init__(self, stretch: float = STRETCH) -> None:
        self._stretch = stretch
        self._answers: float | None = None  # seconds of a step without prompts
        self._token: float | None = None  # seconds more for a prompt token
        self._prompt_token: float | None = None  # the same from steps of prompts alone: an upper bound

    def saw(self, answers: int, prompt_tokens: int, seconds: float) -> None:
        """A step of `answers` sequences with one token each and of `prompt_tokens` more took so long."""
        if answers and not prompt_tokens:
            self._answers = _mean(self._answers, seconds)
        elif answers and prompt_tokens >= _LEAST and self._answers is not None:
            self._token = _mean(self._token, max(0.0, seconds - self._answers) / prompt_tokens)
        elif not answers and prompt_tokens >= _LEAST:
            self._prompt_token = _mean(self._prompt_token, seconds / prompt_tokens)

    def prompt_tokens(self, answers: int, *, others: bool = False) -> int | None:
        """How many the next step may take beside `answers` sequences; None for any number.

        others: whether more than one line has had requests of late.
        """
        token = self._prompt_token if self._token is None else self._token
        if not (answers or others) or self._answers is None or not token:
            return None
        tokens = int((self._stretch - 1.0) * self._answers / token)
        return max(_LEAST, tokens // _LEAST * _LEAST)


def _mean(old: float | None, new: float) -> float:
    return new if old is None else _MEMORY * old + (1.0 - _MEMORY) * new
