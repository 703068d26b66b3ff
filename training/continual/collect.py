"""Served answers that callers marked, as the next stage's examples.

A correction is the answer wanted; an answer rated good is its own. An answer rated bad and not corrected teaches
nothing here and is left out. A text that was continued becomes the user's message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hub.errors import RefInvalid
from hub.refs import AdapterRef, Alias, Digest
from server.engine.request import AdapterUse, FinishReason
from server.feedback.mark import Mark
from training.data import Example, Message

Ratings = Literal["good", "corrected", "all"]


@dataclass(frozen=True)
class AnsweredBy:
    """A version, or any version of a name, among those that answered."""

    ref: AdapterRef
    any_version: bool

    @classmethod
    def parse(cls, text: str) -> AnsweredBy:
        """Raises `RefInvalid`, for an alias too: it may have moved since."""
        ref = AdapterRef.parse(text)
        any_version = text == ref.full_name
        if isinstance(ref.selector, Alias) and not any_version:
            raise RefInvalid(f"{text} is an alias, which moves: give the name alone, or a version (@3, @sha256:…)")
        return cls(ref, any_version)

    def includes(self, use: AdapterUse) -> bool:
        """Whether this version is meant."""
        if self.any_version:
            return use.name == self.ref.full_name
        if isinstance(self.ref.selector, Digest):
            return use.digest == str(self.ref.selector)
        return use.version == str(self.ref)


@dataclass(frozen=True)
class Collected:
    """Examples, and what became of every mark."""

    kept: tuple[Mark, ...] = field(repr=False)  # one an example, in the order of answering
    found: int  # marked answers
    good: int
    corrected: int
    bad: int  # left out: rated bad and not corrected
    unasked: int  # left out: another adapter, another kind of mark
    cut_off: int  # of the good ones: ended by max_new_tokens, so that their end is no end

    @property
    def examples(self) -> tuple[Example, ...]:
        """What the kept marks teach."""
        return tuple(map(example, self.kept))

    @property
    def versions(self) -> dict[str, int]:
        """That answered the examples, weights beside those that are not 1; the base by its name."""
        return dict(Counter(map(_versions, self.kept)).most_common())

    @property
    def first(self) -> str | None:
        """When the first of the examples was answered."""
        return min((mark.answered for mark in self.kept), default=None)

    @property
    def last(self) -> str | None:
        """When the last of them was."""
        return max((mark.answered for mark in self.kept), default=None)

    def only(self, numbers: Iterable[int]) -> Collected:
        """The same with these of its examples alone, counted from 0: what is left after cleaning."""
        return replace(self, kept=tuple(self.kept[number] for number in numbers))

    def as_json(self) -> dict[str, Any]:
        """Counts and provenance, no text of anybody's."""
        return {
            "found": self.found,
            "good": self.good,
            "corrected": self.corrected,
            "bad_dropped": self.bad,
            "not_asked_for": self.unasked,
            "good_but_cut_off": self.cut_off,
            "answered_by": self.versions,
            "answered_from": self.first,
            "answered_until": self.last,
        }


def collect(marks: Sequence[Mark], *, ratings: Ratings = "all", answered_by: AnsweredBy | None = None) -> Collected:
    """The examples that `marks` make, one an answer."""
    kept: list[Mark] = []
    counts: Counter[str] = Counter()
    for mark in marks:
        if answered_by is not None and not any(map(answered_by.includes, mark.adapters)):
            counts["unasked"] += 1
        elif mark.correction is None and mark.rating == "bad":
            counts["bad"] += 1
        elif ratings not in ("all", kind := "good" if mark.correction is None else "corrected"):
            counts["unasked"] += 1
        else:
            counts[kind] += 1
            counts["cut_off"] += kind == "good" and mark.finish is FinishReason.LENGTH
            kept.append(mark)
    return Collected(
        kept=tuple(kept),
        found=len(marks),
        good=counts["good"],
        corrected=counts["corrected"],
        bad=counts["bad"],
        unasked=counts["unasked"],
        cut_off=counts["cut_off"],
    )


def example(mark: Mark) -> Example:
    """The conversation with the answer wanted."""
    asked = (("user", mark.prompt),) if isinstance(mark.prompt, str) else mark.prompt
    answer = mark.answer if mark.correction is None else mark.correction
    return Example((*(Message(role, content) for role, content in asked), Message("assistant", answer)))


def _versions(mark: Mark) -> str:
    uses = (use.version if use.weight == 1 else f"{use.version} × {use.weight:g}" for use in mark.adapters)
    return " + ".join(uses) or mark.base
