"""A mark of one answer: what was asked, what was answered by which versions, what the caller says of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from hub.json_text import parse_object
from server.engine.request import AdapterUse, FinishReason

SCHEMA: Final = 1
# A call's four megabytes, every character of them escaped.
MAX_LINE_BYTES: Final = 64 * 1024 * 1024

Rating = Literal["good", "bad"]
Turns = tuple[tuple[str, str], ...]
"""A conversation, as ("role", "content")."""


@dataclass(frozen=True)
class Mark:
    """A rating, a correction or both, with all that a later training stage needs to know."""

    marked: str  # "2026-11-28T06:40:00.123456Z"
    answered: str
    answer_id: str  # drawn by the server: callers may use one request id twice
    index: int  # the candidate
    tenant: str
    request_id: str  # the caller's
    prompt: str | Turns  # a text that was continued, or a conversation
    answer: str
    finish: FinishReason
    base: str
    adapters: tuple[AdapterUse, ...]  # empty: the base answered
    rating: Rating | None
    correction: str | None
    comment: str

    @property
    def key(self) -> tuple[str, int]:
        """Of the answer: a later mark with the same key replaces this one."""
        return self.answer_id, self.index

    def as_line(self) -> bytes:
        """One line of JSON, its end included."""
        prompt = (
            {"text": self.prompt}
            if isinstance(self.prompt, str)
            else {"messages": [{"role": role, "content": content} for role, content in self.prompt]}
        )
        row = {
            "schema": SCHEMA,
            "marked": self.marked,
            "answered": self.answered,
            "answer_id": self.answer_id,
            "index": self.index,
            "tenant": self.tenant,
            "request_id": self.request_id,
            "prompt": prompt,
            "answer": self.answer,
            "finish": self.finish.value,
            "base": self.base,
            "adapters": [{"version": use.version, "digest": use.digest, "weight": use.weight} for use in self.adapters],
            "rating": self.rating,
            "correction": self.correction,
            "comment": self.comment,
        }
        return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def parse_mark(line: bytes) -> Mark:
    """The mark in a line; raises ValueError for anything that `as_line` does not write, half a line included."""
    row = parse_object(line, max_bytes=MAX_LINE_BYTES)
    match row:
        case {
            "schema": 1,
            "marked": str(marked),
            "answered": str(answered),
            "answer_id": str(answer_id),
            "index": int(index),
            "tenant": str(tenant),
            "request_id": str(request_id),
            "prompt": dict(prompt),
            "answer": str(answer),
            "finish": str(finish),
            "base": str(base),
            "adapters": list(adapters),
            "rating": "good" | "bad" | None as rating,
            "correction": str() | None as correction,
            "comment": str(comment),
        }:
            return Mark(
                marked=marked,
                answered=answered,
                answer_id=answer_id,
                index=index,
                tenant=tenant,
                request_id=request_id,
                prompt=_prompt(prompt),
                answer=answer,
                finish=FinishReason(finish),
                base=base,
                adapters=tuple(map(_adapter, adapters)),
                rating=rating,
                correction=correction,
                comment=comment,
            )
    raise ValueError("is no mark of an answer")


def time_text(seconds: float) -> str:
    """A Unix time as marks hold it; texts order as the times do."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _prompt(value: dict[str, Any]) -> str | Turns:
    match value:
        case {"text": str(text)}:
            return text
        case {"messages": list(messages)} if messages:
            return tuple(map(_turn, messages))
    raise ValueError("has no prompt")


def _turn(value: object) -> tuple[str, str]:
    match value:
        case {"role": str(role), "content": str(content)}:
            return role, content
    raise ValueError("has a message without role or content")


def _adapter(value: object) -> AdapterUse:
    match value:
        case {"version": str(version), "digest": str(digest), "weight": int() | float() as weight} if math.isfinite(
            weight
        ):
            return AdapterUse(digest, version, float(weight))
    raise ValueError("has an adapter without version, digest or weight")
