"""Conditions to search versions by, parsed once."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from hub.errors import QueryInvalid
from hub.refs import Digest
from hub.versions import Version

METRIC_NAME: Final = re.compile(r"[A-Za-z0-9_.:/@-]{1,128}", re.ASCII)
_TEST = re.compile(r"\s*([A-Za-z0-9_.:/@-]{1,128})\s*(>=|<=|==|!=|=|>|<)\s*(\S+)\s*", re.ASCII)
COMPARE: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True)
class MetricTest:
    """A condition on one recorded metric; a version without that metric does not meet it."""

    name: str  # nested metrics joined with dots: "test.f1"
    compare: str  # one of COMPARE
    bound: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """`text` such as "f1 > 0.8" or "test.loss<=1.5"; raises QueryInvalid."""
        found = _TEST.fullmatch(text)
        if found is None:
            raise QueryInvalid(f"{text[:80]!a} is no condition on a metric: write 'f1 > 0.8' (>, >=, <, <=, ==, !=)")
        return cls(found[1], found[2] if found[2] != "=" else "==", parse_bound(found[3]))

    def met_by(self, value: float) -> bool:
        """Whether a metric of this value meets the condition."""
        return bool(COMPARE[self.compare](value, self.bound))

    def __str__(self) -> str:
        return f"{self.name} {self.compare} {self.bound:g}"


@dataclass(frozen=True)
class Query:
    """Which versions; every condition given must hold."""

    pattern: str | None = None  # shell pattern for the adapter's name
    base: str | None = None  # the base's name, or its fingerprint's beginning ("sha256:12…")
    tag: str | None = None  # an alias that holds the version
    metrics: tuple[MetricTest, ...] = ()
    newest: bool = False  # only the newest version of each adapter is asked
    after: tuple[str, int] = ("", 0)  # full name and number of the last version of the page before
    limit: int = 1000

    def __post_init__(self) -> None:
        """Raise QueryInvalid for what is no text: a shell hands on any bytes, databases and wires take UTF-8."""
        for text in filter(None, (self.pattern, self.base, self.tag)):
            if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
                raise QueryInvalid(f"{text[:40]!a} is no text in UTF-8")


@dataclass(frozen=True)
class Page:
    """Some of what a query finds, by name and number."""

    versions: tuple[Version, ...]
    aliases: Mapping[Digest, tuple[str, ...]]  # by version: the aliases that hold it, or some of it, in order
    more: bool  # ask again with `after` at the last of these


def parse_bound(text: str) -> float:
    """A finite number; raises QueryInvalid."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise QueryInvalid(f"{text[:40]!a} is no number")
    return value


def metric_numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The metrics that conditions can name: numbers, nested keys joined with dots, names as METRIC_NAME says."""
    for key, item in metrics.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            yield from metric_numbers(item, f"{name}.")
        elif isinstance(item, (int, float)) and not isinstance(item, bool) and METRIC_NAME.fullmatch(name):
            yield name, float(item)
