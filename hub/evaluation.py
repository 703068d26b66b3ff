"""One record of scores: what it holds, as JSON, and what is refused as one.

{"schema": "loraplex.evaluation/1", "version": "team/x@3", "digest": …, "task": …, "data": {"digest", "examples"},
 "base": {"name", "quantization"}, "metrics": {name: number}, "intervals": {name: [low, high]}, "at": …, "by": …}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self

from hub import json_text
from hub.errors import BlobCorrupt, EvaluationRefused, RefInvalid
from hub.refs import Digest
from hub.search import METRIC_NAME

SCHEMA: Final = "loraplex.evaluation/1"
MAX_RECORD_BYTES: Final = 64 * 1024
MAX_METRICS: Final = 256
MAX_TEXT_CHARS: Final = 1000
_TIME: Final = re.compile(r"(\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z)?", re.ASCII)


@dataclass(frozen=True)
class Evaluation:
    """One version's scores on one task."""

    version: str  # "team/x@3"
    digest: Digest  # the version's
    task: str
    data: Mapping[str, Any]  # "digest" of the questions' file, and how many "examples" were asked
    base: Mapping[str, Any]  # "name" and "quantization" of what the adapter ran on
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]  # 95 %, over the questions
    at: str = ""  # RFC 3339, UTC; given by the hub that keeps it, as is `by`
    by: str | None = None

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """A record's bytes; raises BlobCorrupt."""
        try:
            value = json_text.parse_object(data, max_bytes=MAX_RECORD_BYTES)
            if value.pop("schema", None) != SCHEMA:
                raise ValueError("has a schema this release does not read")
            if value.keys() != {field.name for field in fields(cls)}:
                raise ValueError("has other keys than a record has")
            _check(value)
            value["digest"] = Digest.parse(value["digest"])
        except (ValueError, RefInvalid) as error:
            raise BlobCorrupt(f"an evaluation's record {error}") from error
        value["metrics"] = {name: float(number) for name, number in value["metrics"].items()}
        value["intervals"] = {name: (float(low), float(high)) for name, (low, high) in value["intervals"].items()}
        return cls(**value)

    def encode(self) -> bytes:
        """The record's bytes; raises EvaluationRefused where it is none that can be kept."""
        value = asdict(self)
        try:
            _check(value)
            data = json_text.canonical({"schema": SCHEMA, **value})
            if len(data) > MAX_RECORD_BYTES:
                raise ValueError(f"has {len(data)} bytes, the limit is {MAX_RECORD_BYTES}")
        except ValueError as error:
            raise EvaluationRefused(f"the evaluation cannot be kept: its record {error}") from error
        return data

    def named_metrics(self) -> dict[str, float]:
        """Its numbers as gates name them, "task.metric"."""
        return {f"{self.task}.{metric}": number for metric, number in self.metrics.items()}


def _check(value: Mapping[str, Any]) -> None:
    """Raise ValueError, which says what is wrong, for anything but the values of a sound record."""
    for key in ("version", "digest", "task"):
        _check_text(key, value[key])
    if value["by"] is not None:
        _check_text("by", value["by"])
    if not isinstance(value["at"], str) or not _TIME.fullmatch(value["at"]):
        raise ValueError("has a time that is not RFC 3339 in UTC")
    for key, known in (("data", {"digest", "examples"}), ("base", {"name", "quantization"})):
        if not isinstance(value[key], Mapping) or value[key].keys() != known:
            raise ValueError(f"has a {key} without exactly {' and '.join(sorted(known))}")
    _check_text("data.digest", value["data"]["digest"])
    examples = value["data"]["examples"]
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise ValueError("counts no examples, from 1 up")
    for key, text in value["base"].items():
        _check_text(f"base.{key}", text)
    _check_numbers(value["task"], value["metrics"], value["intervals"])


def _check_numbers(task: str, metrics: Any, intervals: Any) -> None:
    if not isinstance(metrics, Mapping) or not 0 < len(metrics) <= MAX_METRICS:
        raise ValueError(f"has not from 1 to {MAX_METRICS} metrics")
    for name, number in metrics.items():
        if not (METRIC_NAME.fullmatch(name) and METRIC_NAME.fullmatch(f"{task}.{name}")):
            raise ValueError(f"names the metric {name[:80]!a} of the task {task[:80]!a}, which no gate can ask for")
        if not _finite(number):
            raise ValueError(f"has a {name} that is no finite number")
    if not isinstance(intervals, Mapping) or not intervals.keys() <= metrics.keys():
        raise ValueError("has intervals of other metrics than it has")
    for name, interval in intervals.items():
        if not isinstance(interval, (list, tuple)) or len(interval) != 2 or not all(map(_finite, interval)):
            raise ValueError(f"has an interval of {name} that is not two finite numbers")
        if interval[0] > interval[1]:
            raise ValueError(f"has an interval of {name} that ends below its beginning")


def _check_text(key: str, text: Any) -> None:
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT_CHARS or not text.isprintable():
        raise ValueError(f"has a {key} that is no printable line of at most {MAX_TEXT_CHARS} characters")


def _finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
