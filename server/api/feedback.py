"""`Inference.Feedback`: answers are overheard and remembered for a while; those that callers mark go to the store.

Nothing but marks reaches the disk, and only the tenant that was answered may mark. Writing is done by a thread of its
own, one mark after the other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, TypeVar

from protos.loraplex.v1 import inference_pb2 as wire
from server.api.admission import Admitted
from server.api.parse import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from server.config import FeedbackConfig
from server.engine.request import Delta, FinishReason
from server.errors import FeedbackOff, InvalidRequest, PromptNotText, QueueFull, RequestNotFound
from server.feedback.mark import Mark, Rating, Turns, time_text
from server.feedback.recent import Answered, RecentAnswers
from server.feedback.store import FeedbackStore, prepare_directory

log = logging.getLogger(__name__)
T = TypeVar("T")

FORGET_SECONDS: Final = 60.0
REMOVE_SECONDS: Final = 3600.0
_RATINGS: Final[dict[int, Rating | None]] = {
    wire.RATING_UNSPECIFIED: None,
    wire.RATING_GOOD: "good",
    wire.RATING_BAD: "bad",
}


class Codec(Protocol):
    """The part of `server.model.text.Text` that tells whether token ids are a text."""

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""


class Listener(Protocol):
    """Is told every delta of one call, before the caller gets it."""

    def hear(self, index: int, delta: Delta) -> None:
        """What is new of candidate `index`; no error."""


class Feedback(Protocol):
    """What the service asks of either kind: marks that are kept, or none."""

    def listen(self, admitted: Admitted) -> Listener:
        """Somebody to tell the answers to a call."""

    async def mark(self, message: wire.FeedbackRequest, tenant: str) -> bool:
        """Keep what a caller says of an answer; whether an earlier mark of it was replaced."""

    def close(self) -> None:
        """End what runs beside."""


class NoFeedback:
    """Remembers nothing and refuses every mark."""

    def listen(self, admitted: Admitted) -> Listener:
        """Nobody."""
        return self

    def hear(self, index: int, delta: Delta) -> None:
        """Nothing is kept."""

    async def mark(self, message: wire.FeedbackRequest, tenant: str) -> bool:
        """Raises `FeedbackOff`."""
        raise FeedbackOff("this server keeps no feedback; it is started with --feedback DIR to do so")

    def close(self) -> None:
        """Nothing runs."""


@dataclass(frozen=True)
class _Said:
    """What a caller says of an answer."""

    index: int
    rating: Rating | None
    correction: str | None
    comment: str


class KeptFeedback:
    """Remembers answers and stores marks. Used on one event loop: `start`, then anything, then `close`."""

    def __init__(self, config: FeedbackConfig, codec: Codec, base: str, count: Callable[[str], None]) -> None:
        """`base` names what answers where no adapter does; `count` is told each stored mark's rating."""
        self._config = config
        self._codec = codec
        self._base = base
        self._count = count
        self._recent = RecentAnswers(
            seconds=config.window_seconds, max_answers=config.max_answers, max_bytes=config.max_answer_bytes
        )
        self._store = FeedbackStore(
            config.directory,
            retention_seconds=config.retention_seconds,
            max_tenant_bytes=config.max_tenant_bytes,
        )
        self._pending = 0
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="loraplex-feedback")
        self._upkeep: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin; what is past its retention is removed first. Raises `FeedbackDirectoryUnusable`."""
        await self._in_writer(partial(prepare_directory, self._config.directory))
        await self._in_writer(self._store.remove_old)
        self._upkeep = asyncio.get_running_loop().create_task(self._keep_up())

    def listen(self, admitted: Admitted) -> Listener:
        """Remembers the answers once all candidates have ended well."""
        return _Overheard(admitted, self._recent.add)

    async def mark(self, message: wire.FeedbackRequest, tenant: str) -> bool:
        """Store a mark; on return it survives a power cut. True: it replaces an earlier one.

        Raises `InvalidRequest`, `RequestNotFound`, `PromptNotText`, `QueueFull`, `FeedbackFull`, `FeedbackNotStored`.
        """
        said = self._parse(message)
        answered = self._recent.find(tenant, message.request_id)
        if answered is None:
            raise RequestNotFound(
                f"no request of this id was answered to you in the last {self._config.window_seconds:g} seconds"
            )
        if said.index >= len(answered.answers):
            raise InvalidRequest(f"index must be below {len(answered.answers)}, the number of answers")
        if self._pending >= self._config.max_pending:
            raise QueueFull(f"{self._pending} marks are already waiting to be stored")
        self._pending += 1
        try:
            return await self._in_writer(partial(self._write, answered, said))
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Forget what is remembered and end the thread; the mark it is writing is finished."""
        if self._upkeep is not None:
            self._upkeep.cancel()
        self._writing.shutdown(wait=False, cancel_futures=True)

    def _parse(self, message: wire.FeedbackRequest) -> _Said:
        if not message.request_id:
            raise InvalidRequest("request_id is empty")
        if message.rating not in _RATINGS:
            raise InvalidRequest(f"rating {message.rating} is none that this server knows")
        correction = message.correction if message.HasField("correction") else None
        if correction is not None:
            _check_length("correction", correction, self._config.max_correction_chars)
            if not correction.strip():
                raise InvalidRequest("correction is blank; leave it out where there is none")
        _check_length("comment", message.comment, self._config.max_comment_chars)
        rating = _RATINGS[message.rating]
        if rating is None and correction is None:
            raise InvalidRequest("give a rating, a correction, or both")
        return _Said(message.index, rating, correction, message.comment)

    def _write(self, answered: Answered, said: _Said) -> bool:
        """On the writing thread."""
        mark = Mark(
            marked=time_text(time.time()),
            answered=time_text(answered.answered),
            answer_id=answered.id,
            index=said.index,
            tenant=answered.tenant,
            request_id=answered.request_id,
            prompt=self._as_text(answered.prompt),
            answer=answered.answers[said.index],
            finish=answered.finishes[said.index],
            base=self._base,
            adapters=answered.adapters,
            rating=said.rating,
            correction=said.correction,
            comment=said.comment,
        )
        self._store.append(mark)
        replaced = said.index in answered.marked
        answered.marked.add(said.index)
        self._count(said.rating or "none")
        return replaced

    def _as_text(self, prompt: str | Turns | array[int]) -> str | Turns:
        if not isinstance(prompt, array):
            return prompt
        ids = prompt.tolist()
        text = self._codec.decode(ids)
        if self._codec.encode(text) != ids:
            raise PromptNotText(
                "this request's token ids are not those of any text (special tokens are none); "
                "send chat or text where answers are to be marked"
            )
        return text

    async def _keep_up(self) -> None:
        left = REMOVE_SECONDS
        while True:
            pause = min(FORGET_SECONDS, max(self._config.window_seconds, 1.0))
            await asyncio.sleep(pause)
            self._recent.forget_old()
            left -= pause
            if left > 0:
                continue
            left = REMOVE_SECONDS
            try:
                await self._in_writer(self._store.remove_old)
            except Exception:
                log.exception("feedback past its retention was not removed; trying again in an hour")

    async def _in_writer(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._writing, work)


class _Overheard:
    """One call's answers so far."""

    def __init__(self, admitted: Admitted, remember: Callable[[Answered], None]) -> None:
        self._admitted = admitted
        self._remember = remember
        self._texts: list[list[str]] = [[] for _ in admitted.requests]
        self._finishes: dict[int, FinishReason] = {}

    def hear(self, index: int, delta: Delta) -> None:
        """Remember the answers when the last candidate has ended."""
        self._texts[index].append(delta.text)
        if delta.finish is None:
            return
        self._finishes[index] = delta.finish.reason
        if len(self._finishes) < len(self._texts):
            return
        admitted = self._admitted
        self._remember(
            Answered(
                tenant=admitted.tenant,
                request_id=admitted.caller_id,
                prompt=_given(admitted.prompt),
                answers=tuple(map("".join, self._texts)),
                finishes=tuple(reason for _, reason in sorted(self._finishes.items())),
                adapters=admitted.adapters,
                answered=time.time(),
            )
        )


def _given(prompt: Prompt) -> str | Turns | array[int]:
    match prompt:
        case TextPrompt(text):
            return text
        case ChatPrompt(messages):
            return messages
        case TokenPrompt(ids):
            return array("L", ids)


def _check_length(field: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise InvalidRequest(f"{field} has {len(text)} characters; at most {limit} are allowed")
