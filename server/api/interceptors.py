"""Exceptions → gRPC statuses, in one place.

Handlers raise what went wrong; this interceptor answers the call with a status, the error's message, and its stable
reason in the trailing metadata `loraplex-reason`. What is not an error of ours is answered "internal error" and
logged: its text may hold paths or values that are nobody's business.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc

from hub import errors as hub_errors
from server import errors

log = logging.getLogger(__name__)

REASON_KEY = "loraplex-reason"
INTERNAL_REASON = "INTERNAL"
CANCELLED_REASON = "CANCELLED"
# A status message travels in metadata, which is bounded; a message may quote what the caller sent.
MAX_MESSAGE_CHARS = 1000


class MalformedMessage(errors.InvalidRequest):
    """The bytes of the call are no message of the expected type."""

    reason = "MESSAGE_MALFORMED"


class Loading(errors.ServerError):
    """The base model is not loaded yet."""

    reason = "LOADING"


# The closest class of an error's ancestry decides.
STATUSES: dict[type[Exception], grpc.StatusCode] = {
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
    hub_errors.RefInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    hub_errors.NotFound: grpc.StatusCode.NOT_FOUND,
    hub_errors.AliasMoved: grpc.StatusCode.ABORTED,
    hub_errors.QueryInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    hub_errors.GateMalformed: grpc.StatusCode.INVALID_ARGUMENT,
    hub_errors.VersionHeld: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.NotRestorable: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.NothingToRollBack: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.GateRefused: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.HubReadOnly: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.BlobsSwept: grpc.StatusCode.ABORTED,
    hub_errors.BlobCorrupt: grpc.StatusCode.DATA_LOSS,
    hub_errors.SignatureMissing: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.SignatureUntrusted: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.SignatureInvalid: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.HubUnavailable: grpc.StatusCode.UNAVAILABLE,
    hub_errors.ServerBusy: grpc.StatusCode.UNAVAILABLE,
    # This server's own token, not the caller's.
    hub_errors.Unauthenticated: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.Forbidden: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.BaseError: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.AdapterRejected: grpc.StatusCode.FAILED_PRECONDITION,
    hub_errors.HubError: grpc.StatusCode.INTERNAL,
}


def answer_for(error: Exception) -> tuple[grpc.StatusCode, str, str]:
    """(status, message, reason) that a caller gets for `error`."""
    for ancestor in type(error).__mro__:
        status = STATUSES.get(ancestor)
        if status is not None and isinstance(error, errors.ServerError | hub_errors.HubError):
            message = str(error)
            if len(message) > MAX_MESSAGE_CHARS:
                message = message[: MAX_MESSAGE_CHARS - 1] + "…"
            return status, message, error.reason
    return grpc.StatusCode.INTERNAL, "internal error", INTERNAL_REASON


class StatusInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # no subscript at run time
    """Answers what handlers raise. `count_error` is told each failed call's reason.

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
                self._count_error(CANCELLED_REASON)
                raise
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await self._abort(context, method, error)

        return guarded

    def _guarded_stream(self, behaviour: Callable[..., AsyncIterator[Any]], method: str) -> Callable[..., Any]:
        """Around an asynchronous generator."""

        async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            try:
                self._check(request, method)
                async for message in behaviour(request, context):
                    yield message
            except asyncio.CancelledError:
                self._count_error(CANCELLED_REASON)
                raise
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await self._abort(context, method, error)

        return guarded

    def _check(self, request: Any, method: str) -> None:
        self._admission(method)
        if isinstance(request, MalformedMessage):
            raise request

    async def _abort(self, context: grpc.aio.ServicerContext[Any, Any], method: str, error: Exception) -> NoReturn:
        status, message, reason = answer_for(error)
        if reason == INTERNAL_REASON:
            log.error("%s failed", method, exc_info=error)
        self._count_error(reason)
        await context.abort(status, message, ((REASON_KEY, reason),))
        raise AssertionError("abort returned")


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Parse, or hand the handler a `MalformedMessage`: raised here, it would end as UNKNOWN with a stack trace."""

    def parsed(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except Exception:
            return MalformedMessage("the call's bytes are no message of the method's request type")

    return parsed
