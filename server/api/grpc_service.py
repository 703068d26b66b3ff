"""The services `loraplex.v1.Inference` and `loraplex.v1.Adapters`: messages ⇄ nouns, nothing else.

Handlers raise; `interceptors.py` answers. Whatever ends a call early (the client cancels or dies, its deadline
passes, a write fails, the server stops) arrives here as an exception in the frame that reads the outbox, and the
engine is told in `finally`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from hub.refs import AdapterRef
from protos.loraplex.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from server.adapters.directory import AdapterDirectory, ResolvedAdapter
from server.api import encode
from server.api.admission import Admission, Admitted
from server.api.candidates import Candidates
from server.api.feedback import Feedback
from server.api.parse import RequestParser, tenant_of
from server.engine.request import Delta
from server.errors import QueueFull

if TYPE_CHECKING:
    from server.adapters.residency import AdapterStatus, Ticket
    from server.engine.engine import Engine

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

MAX_WAITING_LOADS = 32

_TIERS = {
    "loading": adapters_pb2.TIER_LOADING,
    "host": adapters_pb2.TIER_HOST,
    "device": adapters_pb2.TIER_DEVICE,
}


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Generation and what goes with it."""

    def __init__(
        self,
        engine: Engine,
        admission: Admission,
        parser: RequestParser,
        model_info: inference_pb2.ModelInfo,
        feedback: Feedback,
        tenant_header: str | None = None,
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._parser = parser
        self._model_info = model_info
        self._feedback = feedback
        self._tenant_header = tenant_header

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """Answer when generation ended."""
        admitted = await self._admission.admit(request, self._tenant(context))
        deltas: list[list[Delta]] = [[] for _ in admitted.requests]
        listener = self._feedback.listen(admitted)
        with self._running(admitted) as answers:
            async for index, delta in answers:
                _raise_error(delta)
                listener.hear(index, delta)
                deltas[index].append(delta)
        return encode.response(admitted.caller_id, admitted.adapters, deltas, admitted.routed)

    async def GenerateStream(self, request: inference_pb2.GenerateRequest, context: Context) -> None:  # noqa: N802
        """Send tokens as they come.

        Written through the context rather than yielded: a failed or cancelled write is then raised in this frame,
        while an abandoned generator would be closed whenever the garbage collector finds it.
        """
        admitted = await self._admission.admit(request, self._tenant(context))
        caller_id, adapters, routed = admitted.caller_id, admitted.adapters, admitted.routed
        listener = self._feedback.listen(admitted)
        with self._running(admitted) as answers:
            await context.write(encode.first_chunk(caller_id, adapters, routed))
            async for index, delta in answers:
                _raise_error(delta)
                # Before the write: who has the last chunk may mark the answer at once.
                listener.hear(index, delta)
                await context.write(encode.chunk(caller_id, adapters, delta, index, routed))

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """The token ids of a text or a conversation, as Generate would see them."""
        ids = await self._admission.tokenize(self._parser.prompt(request))
        return inference_pb2.TokenizeResponse(token_ids=ids, tokens=await self._admission.pieces(ids))

    async def GetModelInfo(  # noqa: N802
        self, request: inference_pb2.GetModelInfoRequest, context: Context
    ) -> inference_pb2.ModelInfo:
        """What is served and the limits of a request."""
        return self._model_info

    async def Feedback(  # noqa: N802
        self, request: inference_pb2.FeedbackRequest, context: Context
    ) -> inference_pb2.FeedbackResponse:
        """Keep what the caller says of an answer."""
        return inference_pb2.FeedbackResponse(replaced=await self._feedback.mark(request, self._tenant(context)))

    def _tenant(self, context: Context) -> str:
        return tenant_of(context.invocation_metadata() or (), self._tenant_header)

    @contextmanager
    def _running(self, admitted: Admitted) -> Iterator[Candidates]:
        """Submit; whatever happens inside, the engine holds nothing of the call afterwards."""
        answers = Candidates(len(admitted.requests))
        submitted: list[str] = []
        try:
            # All or none: when one is refused, those before it end in `finally`.
            for request, outbox in zip(admitted.requests, answers.outboxes, strict=True):
                self._engine.submit(request, outbox)
                submitted.append(request.id)
            yield answers
        finally:
            for request_id in submitted:
                self._engine.cancel(request_id)


class AdaptersService(adapters_pb2_grpc.AdaptersServicer):
    """Administration of what the server holds. `close` ends its threads."""

    def __init__(self, engine: Engine, directory: AdapterDirectory) -> None:
        self._adapters = engine.adapters
        self._directory = directory
        # Loads may wait long for memory, hence threads of their own: an Unload must not queue behind them. One each:
        # who waits for a thread would keep memory that those with threads wait for.
        self._loads = ThreadPoolExecutor(MAX_WAITING_LOADS, thread_name_prefix="loraplex-load")
        self._waiting = 0
        self._quick = ThreadPoolExecutor(2, thread_name_prefix="loraplex-admin")

    async def List(  # noqa: N802
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        """Every adapter that holds memory or is on its way, nearest to the batch first."""
        statuses = await _in(self._quick, self._adapters.list)
        messages = [self._status(status) for status in statuses]
        messages.sort(key=lambda message: (-message.tier, message.version))
        return adapters_pb2.ListAdaptersResponse(adapters=messages)

    async def Load(  # noqa: N802
        self, request: adapters_pb2.LoadAdapterRequest, context: Context
    ) -> adapters_pb2.LoadAdapterResponse:
        """Bring a version onto the device and answer when it is there.

        A thread waits only for what is not there yet, and no longer than the caller does.
        """
        started = time.monotonic()
        found = await self._resolve(request.ref)
        ticket = self._adapters.acquire((found.digest,), (found.version,))
        try:
            if ticket.error is not None or self._adapters.begin(ticket):  # begun, nobody takes it back meanwhile
                status = self._adapters.arrived(ticket)
            else:
                status = await self._arrived(ticket)
        finally:
            self._adapters.release(ticket)
        return adapters_pb2.LoadAdapterResponse(
            adapter=self._status(status), seconds=time.monotonic() - started, warnings=status.warnings
        )

    async def Unload(  # noqa: N802
        self, request: adapters_pb2.UnloadAdapterRequest, context: Context
    ) -> adapters_pb2.UnloadAdapterResponse:
        """Free a version, now or when its last request ends."""
        found = await self._resolve(request.ref)
        return adapters_pb2.UnloadAdapterResponse(
            freed=await _in(self._quick, partial(self._adapters.unload, found.digest))
        )

    def close(self) -> None:
        """End the threads."""
        self._loads.shutdown(wait=False, cancel_futures=True)
        self._quick.shutdown(wait=False, cancel_futures=True)

    async def _arrived(self, ticket: Ticket) -> AdapterStatus:
        if self._waiting >= MAX_WAITING_LOADS:
            raise QueueFull(f"{self._waiting} Loads are already waiting; send it again when one of them is through")
        self._waiting += 1
        try:
            return await _in(self._loads, partial(self._adapters.arrived, ticket))
        finally:
            self._waiting -= 1

    async def _resolve(self, text: str) -> ResolvedAdapter:
        ref = AdapterRef.parse(text)
        found = self._directory.cached(ref)
        return found if found is not None else await _in(self._quick, partial(self._directory.resolve, ref))

    def _status(self, status: AdapterStatus) -> adapters_pb2.AdapterStatus:
        return adapters_pb2.AdapterStatus(
            version=status.version or self._directory.version_of(status.digest) or "",
            digest=status.digest,
            tier=_TIERS[status.tier.value],
            rank=status.rank,
            host_bytes=status.host_bytes,
            device_bytes=status.device_bytes,
            requests_in_flight=status.requests_in_flight,
            draining=status.draining,
        )


async def _in(threads: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, work)


def _raise_error(delta: Delta) -> None:
    if delta.error is not None:
        raise delta.error
