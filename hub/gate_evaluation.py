"""The evaluation a gate names, and what it measured. The hub only carries these; another package runs it.

    [evaluate]
    task = "sentiment"              # what `hub eval --task` takes
    data = "eval.jsonl"             # beside the gate file
    limit = 200                     # only the first examples
    base = "smollm2-135m"
    quantize = "none"

Numbers measured take the place of recorded ones of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from hub.entry_points import entry_points, load
from hub.errors import GateMalformed
from hub.refs import Digest

EVALUATOR = "EVALUATOR"  # beside a package's COMMANDS: "package.module:function", an Evaluator
_KEYS = {"task": str, "data": str, "limit": int, "base": str, "quantize": str}


@dataclass(frozen=True)
class Evaluation:
    """Which evaluation; what its values mean is the evaluator's business."""

    task: str
    data: Path
    limit: int | None = None
    base: str | None = None
    quantize: str | None = None

    @classmethod
    def parse(cls, value: Any, directory: Path) -> Self:
        """The table of a gate file in `directory`; raises ValueError."""
        if not isinstance(value, dict):
            raise ValueError("evaluate is no table")
        if strange := [key for key in value if key not in _KEYS]:
            raise ValueError(f"evaluate has the unknown key {strange[0][:60]!a}; known: {', '.join(_KEYS)}")
        for key, kind in _KEYS.items():
            if key in value and (not isinstance(value[key], kind) or isinstance(value[key], bool) or not value[key]):
                raise ValueError(f"evaluate.{key} is no {'number' if kind is int else 'text'}")
        if "task" not in value or "data" not in value:
            raise ValueError("evaluate needs a task and data")
        if value.get("limit", 1) < 1:
            raise ValueError("evaluate.limit is from 1 up")
        return cls(**{**value, "data": directory / value["data"]})


@dataclass(frozen=True)
class Scores:
    """What an evaluation just measured of the version to promote, and of the one that the alias held then."""

    candidate: Mapping[str, float]
    current: Mapping[str, float] = field(default_factory=dict)
    current_digest: Digest | None = None  # None: nothing was compared with
    source: str = ""  # for people and the audit: "sentiment, 200 examples, data sha256:0123…"


@dataclass(frozen=True)
class Measured:
    """What an evaluator returns."""

    scores: tuple[Mapping[str, float], ...]  # one a reference, in order
    source: str


# Scores references into the hub at a URL (None: the default) by an evaluation; raises what it likes with a `reason`.
Evaluator = Callable[[Evaluation, Sequence[str], str | None], Measured]


def find_evaluator() -> Evaluator:
    """The installed package's evaluator; raises GateMalformed where there is none."""
    for commands in entry_points("hub.commands").values():
        try:
            target = getattr(import_module(commands.partition(":")[0]), EVALUATOR, None)
        except ImportError:
            continue
        if target is not None:
            found: Evaluator = load(target)
            return found
    raise GateMalformed("the gate names an evaluation, and no installed package can run one: install loraplex[train]")
