"""What a check of a data file has to say: findings with examples, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import dropwhile, pairwise
from typing import Any

from training.data import Example, Messages
from training.errors import DataTooSmall
from training.tasks import Answers


@dataclass(frozen=True)
class Sample:
    """One place in the file that shows a finding."""

    line: int
    text: str
    other: str | None = None  # what it collides with, and where


@dataclass(frozen=True)
class Finding:
    """One check's result."""

    check: str  # stable name
    count: int  # examples, or lines
    message: str
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Line:
    """An example and where it stands."""

    number: int  # from 1
    raw: str
    example: Example

    @property
    def question(self) -> str:
        """What is asked: every message in front of the answer but the system's."""
        return _asked(self.example.prompt)

    @property
    def questions(self) -> tuple[str, ...]:
        """What every answer in the conversation is to, the last one's question last."""
        return tuple(_asked(question) for question in self.example.questions)

    @property
    def system(self) -> str:
        """The instruction, empty where there is none."""
        return "\n".join(message.content for message in self.example.prompt if message.role == "system")

    @property
    def content(self) -> str:
        """Question and answer."""
        return f"{self.question}\n{self.example.answer}"


def _asked(messages: Messages) -> str:
    texts = [message.content for message in messages if message.role != "system"]
    return "\n".join(texts or [message.content for message in messages])


@dataclass(frozen=True)
class LengthBin:
    """How many are between `shortest` and `longest` tokens long, both included."""

    shortest: int
    longest: int
    conversations: int
    answers: int


@dataclass(frozen=True)
class Report:
    """All that was found."""

    file: str
    digest: str  # "sha256:…" of the file's bytes
    lines: int  # not blank
    answers: Answers  # what kind of answers the file was judged as
    faults: tuple[Finding, ...]
    advice: tuple[Finding, ...]
    passed: tuple[str, ...]  # names of the checks that ran and found nothing
    labels: dict[str, int]  # for kind "label": answers and how often
    tokens: tuple[tuple[int, int], ...] = field(repr=False)  # of each readable example: (conversation, answer)
    kept: tuple[Line, ...] = field(repr=False)  # without the faults

    @property
    def ok(self) -> bool:
        """Whether there is no fault."""
        return not self.faults

    def without_faults(self) -> bytes:
        """The lines that were kept, as they were. Raises `DataTooSmall` where none is."""
        if not self.kept:
            raise DataTooSmall(f"nothing of {self.file} is left without its faults")
        return "".join(line.raw.rstrip("\r") + "\n" for line in self.kept).encode()

    def as_json(self) -> dict[str, Any]:
        """For programs."""

        def told(finding: Finding) -> dict[str, Any]:
            samples = [
                {"line": s.line, "text": s.text, **({"other": s.other} if s.other else {})} for s in finding.samples
            ]
            return {"check": finding.check, "count": finding.count, "message": finding.message, "examples": samples}

        whole, answer = (sorted(counts[kind] for counts in self.tokens) for kind in (0, 1))
        return {
            "file": self.file,
            "digest": self.digest,
            "lines": self.lines,
            "kept": len(self.kept),
            "ok": self.ok,
            "answers": self.answers,
            "faults": [told(finding) for finding in self.faults],
            "advice": [told(finding) for finding in self.advice],
            "passed": list(self.passed),
            "labels": self.labels,
            "tokens": {"conversation": summary(whole), "answer": summary(answer)},
            "histogram": [asdict(one) for one in self.histogram],
        }

    @property
    def histogram(self) -> tuple[LengthBin, ...]:
        """How many are how long, by powers of two from the shortest answer to the longest conversation."""
        edges = [0, 1]
        while self.tokens and edges[-1] <= max(whole for whole, _ in self.tokens):
            edges.append(edges[-1] * 2)
        bins = [
            LengthBin(
                low, high - 1,
                sum(low <= whole < high for whole, _ in self.tokens),
                sum(low <= answer < high for _, answer in self.tokens),
            )
            for low, high in pairwise(edges)
        ]  # fmt: skip
        return tuple(dropwhile(lambda one: not (one.conversations or one.answers), bins))


def summary(counts: Sequence[int]) -> dict[str, float]:
    """Least, median, 95th percentile, most and mean of sorted counts; empty for none."""
    if not counts:
        return {}
    last = len(counts) - 1
    return {
        "min": counts[0],
        "median": counts[last // 2],
        "p95": counts[round(last * 0.95)],
        "max": counts[-1],
        "mean": round(sum(counts) / len(counts), 1),
    }
