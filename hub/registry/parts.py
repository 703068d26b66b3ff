"""Answers of any length, in messages of bounded size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

from google.protobuf.message import Message

PART_BYTES: Final = 1024 * 1024
M = TypeVar("M", bound=Message)


def in_parts(sent: Iterable[M]) -> Iterator[list[M]]:
    """Messages in lots that fit into one message."""
    part: list[M] = []
    held = 0
    for message in sent:
        size = message.ByteSize()
        if part and held + size > PART_BYTES:
            yield part
            part, held = [], 0
        part.append(message)
        held += size
    if part:
        yield part
