"""What was answered a short while ago, kept in memory so that a mark can refer to it."""

from __future__ import annotations

import sys
import time
import uuid
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from server.engine.request import AdapterUse, FinishReason
from server.feedback.mark import Turns

# Of one answer, beside its texts: the objects that hold it.
OBJECT_BYTES = 1024


@dataclass(frozen=True)
class Answered:
    """A request and its answers."""

    tenant: str
    request_id: str  # the caller's
    prompt: str | Turns | array[int]  # as the caller gave it: a text, a conversation, token ids
    answers: tuple[str, ...]  # one a candidate
    finishes: tuple[FinishReason, ...]
    adapters: tuple[AdapterUse, ...]
    answered: float  # Unix time
    id: str = field(default_factory=lambda: uuid.uuid4().hex)  # unlike every other's
    marked: set[int] = field(default_factory=set)  # candidates with a mark that was stored

    @property
    def size(self) -> int:
        """Bytes it takes in memory, about."""
        match self.prompt:
            case str() | array():
                prompt = sys.getsizeof(self.prompt)
            case turns:
                prompt = sum(sys.getsizeof(content) + OBJECT_BYTES // 4 for _, content in turns)
        return OBJECT_BYTES + prompt + sum(map(sys.getsizeof, self.answers))


@dataclass
class _Shelf:
    """One tenant's answers, oldest first, each with the time when it is forgotten."""

    tenant: str
    answers: OrderedDict[str, tuple[float, Answered]] = field(default_factory=OrderedDict)
    size: int = 0


class RecentAnswers:
    """Answers within bounds of age, number and bytes. For one thread.

    Where there is no room, the oldest answer of the tenant who has most of what is short (answers, or bytes) is
    forgotten first, so that a flood of one tenant's does not push out another's.
    """

    def __init__(
        self, *, seconds: float, max_answers: int, max_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._seconds = seconds
        self._max_answers = max_answers
        self._max_bytes = max_bytes
        self._clock = clock
        self._shelves: dict[str, _Shelf] = {}
        self._count = self._size = 0

    def __len__(self) -> int:
        return self._count

    def add(self, answered: Answered) -> None:
        """Remember it; an earlier request of this tenant with the same id is forgotten."""
        tenant, request_id, size = answered.tenant, answered.request_id, answered.size
        self._forget(tenant, request_id)
        if size > self._max_bytes:
            return
        shelf = self._shelves.setdefault(tenant, _Shelf(tenant))
        shelf.answers[request_id] = (self._clock() + self._seconds, answered)
        shelf.size += size
        self._size += size
        self._count += 1
        self._forget_old(shelf)
        while self._count > self._max_answers:
            self._forget_oldest(max(self._shelves.values(), key=lambda each: len(each.answers)))
        while self._size > self._max_bytes:
            self._forget_oldest(max(self._shelves.values(), key=lambda each: each.size))

    def find(self, tenant: str, request_id: str) -> Answered | None:
        """What was answered to this tenant under this id; None when it was not, or too long ago."""
        shelf = self._shelves.get(tenant)
        if shelf is None:
            return None
        self._forget_old(shelf)
        found = shelf.answers.get(request_id)
        return None if found is None else found[1]

    def forget_old(self) -> None:
        """Free what is too old, of every tenant."""
        for shelf in list(self._shelves.values()):
            self._forget_old(shelf)

    def check_integrity(self) -> None:
        """Raise AssertionError where the sums are not those of what is held."""
        held = [answered for shelf in self._shelves.values() for _, answered in shelf.answers.values()]
        assert self._count == len(held) <= self._max_answers
        assert self._size == sum(answered.size for answered in held) <= self._max_bytes
        assert all(shelf.answers for shelf in self._shelves.values())

    def _forget_old(self, shelf: _Shelf) -> None:
        now = self._clock()
        while shelf.answers:
            request_id, (until, _) = next(iter(shelf.answers.items()))
            if until > now:
                return
            self._forget(shelf.tenant, request_id)

    def _forget_oldest(self, shelf: _Shelf) -> None:
        self._forget(shelf.tenant, next(iter(shelf.answers)))

    def _forget(self, tenant: str, request_id: str) -> None:
        shelf = self._shelves.get(tenant)
        if shelf is None or request_id not in shelf.answers:
            return
        _, answered = shelf.answers.pop(request_id)
        shelf.size -= answered.size
        self._size -= answered.size
        self._count -= 1
        if not shelf.answers:
            del self._shelves[tenant]
