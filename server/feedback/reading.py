"""The marks of a directory as they count: of several of one answer the latest, what a crash left torn passed over."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from server.errors import FeedbackDirectoryUnusable
from server.feedback.mark import Mark, parse_mark
from server.feedback.store import days


@dataclass(frozen=True)
class MarksRead:
    """What was found."""

    marks: tuple[Mark, ...]  # one an answer, in the order of answering
    replaced: int  # earlier marks of the same answers
    unreadable: int  # lines, torn ones by far the likeliest


def read_marks(root: Path, *, tenant: str | None = None, since: date | None = None) -> MarksRead:
    """The marks under `root`, of all tenants or of one, given on the day `since` (UTC) or later.

    Raises `FeedbackDirectoryUnusable` where the files cannot be read.
    """
    latest: dict[tuple[str, int], Mark] = {}
    lines = unreadable = 0
    try:
        for path, day in days(root, tenant):
            if since is not None and day < since:
                continue
            for line in path.read_bytes().split(b"\n"):
                if not line.strip():
                    continue
                lines += 1
                try:
                    mark = parse_mark(line)
                except ValueError:
                    unreadable += 1
                    continue
                latest[mark.key] = mark
    except OSError as error:
        raise FeedbackDirectoryUnusable(f"cannot read feedback in {root}: {os.strerror(error.errno or 0)}") from error
    marks = sorted(latest.values(), key=lambda mark: (mark.answered, mark.key))
    return MarksRead(tuple(marks), lines - unreadable - len(marks), unreadable)
