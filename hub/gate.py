"""What a promotion asks of a version's recorded metrics, as a small TOML or JSON file says.

    require = ["f1 >= 0.8", "test.loss < 1.2"]   # numbers the version must have
    no_lower = {f1 = 0.01}                       # may fall by at most this below what the alias holds now
    no_higher = {"test.loss" = 0}                # may rise by at most this above it
    [evaluate]                                   # optional: measure first, see `hub.gate_evaluation`

Nested metrics are named with dots. A metric that is not recorded fails. Where the alias holds nothing yet, or what it
holds lacks the metric, there is nothing to compare with: `no_lower` and `no_higher` then only ask that the version has
the metric.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from math import isfinite
from pathlib import Path
from typing import Any, Final, Self

from hub import json_text
from hub.errors import GateMalformed, GateRefused, QueryInvalid
from hub.evaluations import Recorded
from hub.gate_evaluation import Evaluation, Scores
from hub.search import METRIC_NAME, MetricTest, metric_numbers
from hub.versions import Version

MAX_GATE_BYTES: Final = 64 * 1024
_KEYS = ("require", "no_lower", "no_higher", "evaluate")


@dataclass(frozen=True)
class Promotion:
    """A promotion that was made."""

    version: Version
    before: Version | None  # what the alias held, of several versions the heaviest
    passed: tuple[str, ...]  # every condition, with the numbers: "f1 0.83 >= 0.8"


@dataclass(frozen=True)
class Gate:
    """Conditions, all of which must hold."""

    require: tuple[MetricTest, ...] = ()
    no_lower: Mapping[str, float] = field(default_factory=dict)
    no_higher: Mapping[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None  # measured before the conditions are compared, by whoever promotes

    @classmethod
    def read(cls, path: Path) -> Self:
        """The gate in a file; raises GateMalformed."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise GateMalformed(f"{path} cannot be read: {error.strerror}") from error
        return cls.parse(data, path.name, path.parent)

    @classmethod
    def parse(cls, data: bytes, name: str = "the gate", directory: Path = Path()) -> Self:
        """The gate in JSON (where the name ends so, or the text begins with a brace) or TOML; raises GateMalformed."""
        try:
            if len(data) > MAX_GATE_BYTES:
                raise ValueError(f"has {len(data)} bytes, the limit is {MAX_GATE_BYTES}")
            if name.endswith(".json") or data.lstrip()[:1] == b"{":
                value: dict[str, Any] = json_text.parse_object(data, max_bytes=MAX_GATE_BYTES)
            else:
                value = tomllib.loads(data.decode("utf-8"))
            if strange := [key for key in value if key not in _KEYS]:
                raise ValueError(f"has the unknown key {strange[0][:60]!a}; known: {', '.join(_KEYS)}")
            gate = cls(
                tuple(map(_test, _list(value.get("require", [])))),
                _slack(value.get("no_lower", {}), "no_lower"),
                _slack(value.get("no_higher", {}), "no_higher"),
                Evaluation.parse(value["evaluate"], directory) if "evaluate" in value else None,
            )
            if not (gate.require or gate.no_lower or gate.no_higher):
                raise ValueError(f"asks for nothing; known: {', '.join(_KEYS[:3])}")
        except (ValueError, QueryInvalid) as error:
            raise GateMalformed(f"{name}: {error}") from error
        return gate

    def check(
        self,
        version: Version,
        current: Version | None,
        scores: Scores | None = None,
        recorded: Recorded | None = None,
    ) -> tuple[str, ...]:
        """Every condition with its numbers, all met by `version`; `current` is what the alias holds.

        `scores` were measured just now and count before metrics of the same name that were `recorded` by evaluations,
        as those do before what the versions were pushed with.

        Raises GateRefused, naming all that failed.
        """
        recorded = recorded or Recorded({}, {}, frozenset())
        have = dict(metric_numbers(version.manifest.metrics)) | dict(recorded.candidate)
        had = dict(metric_numbers(current.manifest.metrics)) if current is not None else {}
        had |= recorded.current
        apart = recorded.apart
        if scores is not None:
            have |= scores.candidate
            if current is not None and scores.current_digest == current.digest:
                had |= scores.current
                apart -= scores.current.keys()
        passed: list[str] = []
        failed: list[str] = []
        for test in self.require:
            if test.name not in have:
                failed.append(f"{test.name} is not recorded")
                continue
            value, bound = _told(have[test.name], test.bound)
            said = f"{test.name} {value} {test.compare} {bound}"
            (passed if test.met_by(have[test.name]) else failed).append(said)
        for slacks, sign, compare in ((self.no_lower, 1, ">="), (self.no_higher, -1, "<=")):
            for name, slack in slacks.items():
                if name not in have:
                    failed.append(f"{name} is not recorded")
                elif name in apart:
                    assert current is not None
                    failed.append(f"{name} of {current.text} was measured by other questions or on another base")
                elif name not in had:
                    passed.append(f"{name} {have[name]:g}, nothing to compare with")
                else:
                    limit = _decimal(had[name]) - sign * _decimal(slack)
                    met = isfinite(have[name]) and (_decimal(have[name]) - limit) * sign >= 0
                    assert current is not None
                    value, bound = _told(have[name], float(limit))
                    said = f"{name} {value} {compare} {bound} ({current.text} has {had[name]:g})"
                    (passed if met else failed).append(said)
        if failed:
            raise GateRefused(f"{version.text} does not pass: {'; '.join(failed)}")
        return tuple(passed)


def _decimal(value: float) -> Decimal:
    """The number as people write it: in binary, 0.8 - 0.1 lies above 0.7."""
    return Decimal(repr(float(value)))


def _told(value: float, bound: float) -> tuple[str, str]:
    """Both numbers, short unless they would look equal and are not."""
    short = f"{value:g}", f"{bound:g}"
    return (repr(value), repr(bound)) if short[0] == short[1] and value != bound else short


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("require is no list")
    return value


def _test(value: Any) -> MetricTest:
    if not isinstance(value, str):
        raise ValueError("require holds something that is no text")
    return MetricTest.parse(value)


def _slack(value: Any, key: str) -> dict[str, float]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} is no table of metric and slack")
    slacks = {}
    for name, slack in value.items():
        number = isinstance(slack, (int, float)) and not isinstance(slack, bool)
        if not METRIC_NAME.fullmatch(name) or not number or not 0 <= slack < float("inf"):
            raise ValueError(f"{key}: {name[:80]!a} needs a slack, a number from 0 up")
        slacks[name] = float(slack)
    return slacks
