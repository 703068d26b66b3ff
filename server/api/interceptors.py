"""Exceptions → gRPC statuses: the hub's as `hub.remote.status` has them, and the server's own.

Handlers raise what went wrong; this interceptor answers the call with a status, the error's message, and its stable
reason in the trailing metadata `loraplex-reason`. What is not an error of ours is answered "internal error" and
logged: its text may hold paths or values that are nobody's business. Nor is how this server stands with its hub.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, NoReturn

import grpc

from hub import errors as hub_errors
from hub.remote import status
from hub.remote.status import INTERNAL_REASON, REASON_KEY
from server import errors

log = logging.getLogger(__name__)

CANCELLED_REASON = "CANCELLED"
OWN_METHODS: Final = "/loraplex."


class MalformedMessage(errors.InvalidRequest):
    """The bytes of the call are no message of the expected type."""

    reason = "MESSAGE_MALFORMED"


class HubRefuses(errors.ServerError):
    """The shared hub does not accept this server's own token, or not for what was asked: no fault of the caller's."""

    reason = "HUB_REFUSES"


class Loading(errors.ServerError):
    """The base model is not loaded yet."""

    reason = "LOADING"


# The closest class of an error's ancestry decides. The hub's own are as its shared server answers them.
STATUSES: Final[Mapping[type[Exception], grpc.StatusCode]] = {
    **status.STATUSES,
    HubRefuses: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.AdapterUnservable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AdapterInUse: grpc.StatusCode.FAILED_PRECONDITION,
    # Alone too large for this server: unlike QUEUE_FULL, sending it again cannot help.
    errors.RequestTooLarge: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RouterNotFound: grpc.StatusCode.NOT_FOUND,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.FeedbackOff: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RequestNotFound: grpc.StatusCode.NOT_FOUND,
    errors.PromptNotText: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FeedbackFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.FeedbackNotStored: grpc.StatusCode.UNAVAILABLE,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    Loading: grpc.StatusCode.UNAVAILABLE,
    errors.EngineFailed: grpc.StatusCode.UNAVAILABLE,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.NonFiniteLogits: grpc.StatusCode.INTERNAL,
    errors.ServerError: grpc.StatusCode.INTERNAL,
    # Where this server is the hub's client, "busy" is that a server behind it is.
    hub_errors.ServerBusy: grpc.StatusCode.UNAVAILABLE,
}


def answer_for(error: Exception) -> tuple[grpc.StatusCode, str, str]:
    """(status, message, reason) that a caller gets for `error`."""
    if isinstance(error, hub_errors.Unauthenticated | hub_errors.Forbidden):
        error = HubRefuses("the hub refuses this server's own token: whoever runs the server has to renew it")
    return status.answer_for(error, STATUSES)


class StatusInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # no subscript at run time
    """Answers what handlers raise. `count_error` is told the reason of each failed call of our own methods: a health
    watch or a reflection stream ends by its caller's going, and nothing has failed.

    `admission` is asked before each call with the method's name and raises to refuse it (`Loading`, `Draining`).
    """

    def __init__(self, count_error: Callable[[str], None], admission: Callable[[str], None]) -> None:
        self._count_error = count_error
        self._admission = admission

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The method's handler, guarded."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # type: ignore[return-value]  # no such method: gRPC answers UNIMPLEMENTED
        method = handler_call_details.method
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        guard = self._guarded_stream if inspect.isasyncgenfunction(getattr(handler, kind)) else self._guarded
        build = getattr(grpc, f"{kind}_rpc_method_handler")
        guarded: grpc.RpcMethodHandler[Any, Any] = build(
            guard(getattr(handler, kind), method),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )
        return guarded

    def _guarded(self, behaviour: Callable[..., Awaitable[Any]], method: str) -> Callable[..., Awaitable[Any]]:
        """Around a coroutine: a unary answer, or a stream written through the context."""

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                self._check(request, method)
                return await behaviour(request, context)
            except asyncio.CancelledError:
                self._count(method, CANCELLED_REASON)
                raise
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await self._abort(context, method, request, error)

        return guarded

    def _guarded_stream(self, behaviour: Callable[..., AsyncIterator[Any]], method: str) -> Callable[..., Any]:
        """Around an asynchronous generator."""

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                self._check(request, method)
                async for message in behaviour(request, context):
                    yield message
            except asyncio.CancelledError:
                self._count(method, CANCELLED_REASON)
                raise
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await self._abort(context, method, request, error)

        return guarded

    def _check(self, request: Any, method: str) -> None:
        self._admission(method)
        if isinstance(request, MalformedMessage):
            raise request

    def _count(self, method: str, reason: str) -> None:
        if method.startswith(OWN_METHODS):
            self._count_error(reason)

    async def _abort(
        self, context: grpc.aio.ServicerContext[Any, Any], method: str, request: Any, error: Exception
    ) -> NoReturn:
        call = _named(method, request)
        code, message, reason = answer_for(error)
        if reason == INTERNAL_REASON:
            log.error("%s failed", call, exc_info=error)
        elif isinstance(error, hub_errors.HubError) and str(error) != message:
            log.error("%s: %s", call, error)  # in full here, and only here
        self._count(method, reason)
        await context.abort(code, message, ((REASON_KEY, reason),))
        raise AssertionError("abort returned")


def _named(method: str, request: Any) -> str:
    """A call as the log tells it from others: by the id that its caller chose, where there is one."""
    chosen = getattr(request, "request_id", "")
    return f"{method} (request {chosen[:128]!r})" if chosen else method


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Parse, or hand the handler a `MalformedMessage`: raised here, it would end as UNKNOWN with a stack trace."""

    def parsed(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except Exception:
            return MalformedMessage("the call's bytes are no message of the method's request type")

    return parsed
