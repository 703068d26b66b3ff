"""Commands of the AWS command line, taken apart far enough to compare two of them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Final

from training.metrics import Pair

_FENCE: Final = re.compile(r"^```\w*\s*\n(.*?)\n?```$", re.DOTALL)
_POSITIONAL: Final = ""  # the "option" of words that stand before every option


@dataclass(frozen=True)
class Command:
    """`aws SERVICE OPERATION …`."""

    service: str
    operation: str  # "run-instances"; with its condition where it waits for one: "wait tasks-stopped"
    arguments: frozenset[Pair]  # ("--option", its words joined by blanks); a repeated word counts once

    @property
    def options(self) -> frozenset[str]:
        """The names of the options."""
        return frozenset(name for name, _ in self.arguments if name)


def parse_command(text: str) -> Command | None:
    """The command in `text`, a code fence, continued lines and `$` in front allowed; None for anything else.

    The order of options does not matter, the order of an option's words does.
    """
    stripped = text.strip()
    fenced = _FENCE.match(stripped)
    joined = one_line(fenced.group(1) if fenced else stripped)
    if "\n" in joined:
        return None
    try:
        words = shlex.split(joined)
    except ValueError:  # an open quotation
        return None
    if len(words) < 3 or words[0] != "aws" or words[1].startswith("-") or words[2].startswith("-"):
        return None
    waits = words[2] == "wait" and len(words) > 3 and not words[3].startswith("-")
    named = 4 if waits else 3
    values: dict[str, list[str]] = {}
    option = _POSITIONAL
    for word in words[named:]:
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            values.setdefault(option, []).extend([value] if equals else [])
        else:
            values.setdefault(option, []).append(word)
    arguments = frozenset((name, " ".join(given)) for name, given in values.items())
    return Command(words[1], " ".join(words[2:named]), arguments)


def one_line(text: str) -> str:
    """The text with lines that end in a backslash joined to what follows, and without a shell's `$` in front."""
    return re.sub(r"[ \t]*\\[ \t]*\n[ \t]*", " ", text.strip()).removeprefix("$ ")
