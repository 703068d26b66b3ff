"""Loraplex from Python: one client for threads, one for asyncio.

    from server.client import Client

    with Client("127.0.0.1:50051") as client:
        question = [{"role": "user", "content": "A charming film with one weak hour."}]

        answer = client.generate(question, adapters="team/sentiment:prod")
        print(answer.text, answer.adapters[0].version)      # positive team/sentiment@3

        with client.stream(question, adapters=[("team/sentiment", 0.7), "team/summary@2"]) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        print(f"{stream.answer.tokens_per_second:.0f} tokens/s")

`AsyncClient` has the same methods to be awaited. Every failed call is a `GenerationError` with a stable `reason`;
values that no message can hold are a TypeError or ValueError. Calls take a `timeout` in seconds, and wait for ever
without one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self, Unpack

import grpc

from protos.loraplex.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from server import client_messages as messages
from server.client_feedback import Rating, feedback_request
from server.client_messages import (
    Answer,
    AnsweringAdapter,
    AnswerSoFar,
    Candidate,
    Chunk,
    GenerationError,
    HeldAdapter,
    Logprobs,
    ModelInfo,
    Timing,
    Token,
)
from server.client_request import Adapters, Options, Prompt, generate_request, tokenize_request
from server.client_routing import Routing

__all__ = [
    "Adapters",
    "Answer",
    "AnswerStream",
    "AnsweringAdapter",
    "AsyncAnswerStream",
    "AsyncClient",
    "Candidate",
    "Chunk",
    "Client",
    "GenerationError",
    "HeldAdapter",
    "Logprobs",
    "ModelInfo",
    "Options",
    "Prompt",
    "Rating",
    "Routing",
    "Timing",
    "Token",
]

DEFAULT_ADDRESS = "127.0.0.1:50051"
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A server that comes back is found within seconds, however long it was away; gRPC's own pauses grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long one attempt may take, not how long to wait between two.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]


class Client:
    """A connection to a server. Safe to share between threads."""

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """Nothing is sent yet; a server that is not there shows at the first call."""
        self._address = address
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._adapters = adapters_pb2_grpc.AdaptersStub(self._channel)  # type: ignore[no-untyped-call]

    def generate(self, prompt: Prompt, adapters: Adapters = None, **options: Unpack[Options]) -> Answer:
        """The whole answer to `prompt` by the base with `adapters`.

        Raises `GenerationError`, with the reason ADAPTER_NOT_FOUND, CONTEXT_EXCEEDED, QUEUE_FULL, …
        """
        request = generate_request(prompt, adapters, options)
        return messages.answer(self._call(self._inference.Generate, request, options.get("timeout")))

    def stream(self, prompt: Prompt, adapters: Adapters = None, **options: Unpack[Options]) -> AnswerStream:
        """The answer as it comes; returns once the server named the versions that answer. Raises as `generate`."""
        request = generate_request(prompt, adapters, options)
        call = self._inference.GenerateStream(request, timeout=options.get("timeout"))
        return AnswerStream(call, self._address, max(request.n, 1))

    def tokenize(self, prompt: str | Sequence[Mapping[str, str]], *, timeout: float | None = None) -> list[Token]:
        """The tokens of a text, or of chat messages in the base's template."""
        response = self._call(self._inference.Tokenize, tokenize_request(prompt), timeout)
        return [Token(*pair) for pair in zip(response.token_ids, response.tokens, strict=True)]

    def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """What the server serves and the limits of a request."""
        return messages.model_info(
            self._call(self._inference.GetModelInfo, inference_pb2.GetModelInfoRequest(), timeout)
        )

    def feedback(
        self,
        request_id: str,
        rating: Rating | None = None,
        correction: str | None = None,
        *,
        candidate: int = 0,
        comment: str = "",
        timeout: float | None = None,
    ) -> bool:
        """Say what an answer was worth, or what it should have been; True: this replaces an earlier mark of it.

        `request_id` is the answer's. Raises `GenerationError`, with the reason FEEDBACK_OFF, REQUEST_NOT_FOUND, …
        """
        request = feedback_request(request_id, rating, correction, candidate, comment)
        return bool(self._call(self._inference.Feedback, request, timeout).replaced)

    def adapters(self, *, timeout: float | None = None) -> list[HeldAdapter]:
        """The adapters the server holds, those on the device first."""
        response = self._call(self._adapters.List, adapters_pb2.ListAdaptersRequest(), timeout)
        return [messages.held_adapter(each) for each in response.adapters]

    def load(self, ref: str, *, timeout: float | None = None) -> HeldAdapter:
        """Bring a version onto the server's device ahead of its first request."""
        return messages.held_adapter(
            self._call(self._adapters.Load, adapters_pb2.LoadAdapterRequest(ref=ref), timeout).adapter
        )

    def unload(self, ref: str, *, timeout: float | None = None) -> bool:
        """Free a version; False: requests still use it, it is freed when the last of them ends."""
        return bool(self._call(self._adapters.Unload, adapters_pb2.UnloadAdapterRequest(ref=ref), timeout).freed)

    def close(self) -> None:
        """End the connection and the calls on it."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _call(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        try:
            return method(request, timeout=timeout)
        except grpc.RpcError as raised:
            raise messages.error(raised, self._address) from None


class AnswerStream(Iterator[Chunk]):
    """An answer as it comes; leaving its `with` block early cancels it, and so does letting go of it."""

    def __init__(self, call: Any, address: str, candidates: int = 1) -> None:
        self._call = call
        self._address = address
        self._so_far = AnswerSoFar(candidates)
        self._so_far.add(self._next_message())  # names the versions, holds no text

    @property
    def adapters(self) -> tuple[AnsweringAdapter, ...]:
        """The versions that answer."""
        return self._so_far.adapters

    @property
    def routing(self) -> Routing | None:
        """How they were chosen; None where no router was asked."""
        return self._so_far.routing

    @property
    def answer(self) -> Answer | None:
        """The whole answer once the stream has ended, None before."""
        return self._so_far.answer

    def cancel(self) -> None:
        """End the stream; the server frees what it held."""
        self._call.cancel()

    def __next__(self) -> Chunk:
        return self._so_far.add(self._next_message())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.cancel()

    def _next_message(self) -> inference_pb2.GenerateChunk:
        try:
            message: inference_pb2.GenerateChunk = next(self._call)
        except grpc.RpcError as raised:
            raise messages.error(raised, self._address) from None
        return message


class AsyncClient:
    """A connection to a server for one asyncio loop.

    async with AsyncClient() as client:
        answers = await asyncio.gather(*(client.generate(prompt, adapters=ref) for ref in refs))
        async with await client.stream(prompt) as stream:
            async for chunk in stream:
                print(chunk.text, end="", flush=True)
    """

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        """Nothing is sent yet; a server that is not there shows at the first call."""
        self._address = address
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._adapters = adapters_pb2_grpc.AdaptersStub(self._channel)  # type: ignore[no-untyped-call]

    async def generate(self, prompt: Prompt, adapters: Adapters = None, **options: Unpack[Options]) -> Answer:
        """As `Client.generate`."""
        request = generate_request(prompt, adapters, options)
        return messages.answer(await self._call(self._inference.Generate, request, options.get("timeout")))

    async def stream(self, prompt: Prompt, adapters: Adapters = None, **options: Unpack[Options]) -> AsyncAnswerStream:
        """As `Client.stream`."""
        request = generate_request(prompt, adapters, options)
        stream = AsyncAnswerStream(
            self._inference.GenerateStream(request, timeout=options.get("timeout")), self._address, max(request.n, 1)
        )
        await stream.begin()
        return stream

    async def tokenize(self, prompt: str | Sequence[Mapping[str, str]], *, timeout: float | None = None) -> list[Token]:
        """As `Client.tokenize`."""
        response = await self._call(self._inference.Tokenize, tokenize_request(prompt), timeout)
        return [Token(*pair) for pair in zip(response.token_ids, response.tokens, strict=True)]

    async def model_info(self, *, timeout: float | None = None) -> ModelInfo:
        """As `Client.model_info`."""
        return messages.model_info(
            await self._call(self._inference.GetModelInfo, inference_pb2.GetModelInfoRequest(), timeout)
        )

    async def feedback(
        self,
        request_id: str,
        rating: Rating | None = None,
        correction: str | None = None,
        *,
        candidate: int = 0,
        comment: str = "",
        timeout: float | None = None,
    ) -> bool:
        """As `Client.feedback`."""
        request = feedback_request(request_id, rating, correction, candidate, comment)
        return bool((await self._call(self._inference.Feedback, request, timeout)).replaced)

    async def adapters(self, *, timeout: float | None = None) -> list[HeldAdapter]:
        """As `Client.adapters`."""
        response = await self._call(self._adapters.List, adapters_pb2.ListAdaptersRequest(), timeout)
        return [messages.held_adapter(each) for each in response.adapters]

    async def load(self, ref: str, *, timeout: float | None = None) -> HeldAdapter:
        """As `Client.load`."""
        response = await self._call(self._adapters.Load, adapters_pb2.LoadAdapterRequest(ref=ref), timeout)
        return messages.held_adapter(response.adapter)

    async def unload(self, ref: str, *, timeout: float | None = None) -> bool:
        """As `Client.unload`."""
        return bool(
            (await self._call(self._adapters.Unload, adapters_pb2.UnloadAdapterRequest(ref=ref), timeout)).freed
        )

    async def close(self) -> None:
        """End the connection and the calls on it."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any, timeout: float | None = None) -> Any:
        try:
            return await method(request, timeout=timeout)
        except grpc.RpcError as raised:
            raise messages.error(raised, self._address) from None


class AsyncAnswerStream(AsyncIterator[Chunk]):
    """An answer as it comes; leaving its `async with` block early cancels it, and so does letting go of it."""

    def __init__(self, call: Any, address: str, candidates: int = 1) -> None:
        self._call = call
        self._messages: AsyncIterator[inference_pb2.GenerateChunk] = aiter(call)
        self._address = address
        self._so_far = AnswerSoFar(candidates)
        self._cancelled = False

    async def begin(self) -> None:
        """Wait until the server named the versions that answer; `AsyncClient.stream` has done so."""
        self._so_far.add(await self._next_message())

    @property
    def adapters(self) -> tuple[AnsweringAdapter, ...]:
        """The versions that answer."""
        return self._so_far.adapters

    @property
    def routing(self) -> Routing | None:
        """How they were chosen; None where no router was asked."""
        return self._so_far.routing

    @property
    def answer(self) -> Answer | None:
        """The whole answer once the stream has ended, None before."""
        return self._so_far.answer

    def cancel(self) -> None:
        """End the stream; the server frees what it held."""
        self._cancelled = True
        self._call.cancel()

    async def __anext__(self) -> Chunk:
        return self._so_far.add(await self._next_message())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.cancel()

    def __del__(self) -> None:
        # gRPC's loop holds on to its calls: one that nobody reads any more would run to its end on the server.
        with suppress(RuntimeError):  # the loop has ended, and the connection with it
            self._call.cancel()

    async def _next_message(self) -> inference_pb2.GenerateChunk:
        try:
            return await anext(self._messages)
        except grpc.RpcError as raised:
            raise messages.error(raised, self._address) from None
        except asyncio.CancelledError:
            # By `cancel`, unless it is the waiting task itself that somebody cancelled.
            task = asyncio.current_task()
            if not self._cancelled or (task is not None and task.cancelling()):
                raise
            raise messages.cancelled() from None
