"""What handlers raise becomes a status with the hub's stable reason; calls are counted (`hub.remote.status`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, NoReturn

import grpc

from hub.errors import HubError, HubUnavailable, ServerBusy
from hub.registry.patience import Patience
from hub.remote.status import DRAINING_REASON, INTERNAL_REASON, answer_for, trailing

log = logging.getLogger(__name__)
_PREFIX = "/loraplex.v1.Registry/"


class Answers(grpc.ServerInterceptor):  # type: ignore[type-arg]  # no subscript at run time
    """Around every method of the registry. `done` is told method, reason ("OK" for none) and seconds."""

    def __init__(self, done: Callable[[str, str, float], None], admit: Callable[[], bool], patience: Patience) -> None:
        self._done = done
        self._admit = admit
        self._patience = patience

    def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        """The method's handler, guarded; health and reflection as they are."""
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_PREFIX):
            return handler
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        guard = self._streamed if handler.response_streaming else self._single
        build = getattr(grpc, f"{kind}_rpc_method_handler")
        return build(
            guard(getattr(handler, kind), method.removeprefix(_PREFIX)),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _single(self, behaviour: Callable[[Any, Any], Any], method: str) -> Callable[[Any, Any], Any]:
        def guarded(request: Any, context: grpc.ServicerContext) -> Any:
            begun = time.monotonic()
            try:
                self._check()
                answer = behaviour(request, context)
            except Exception as error:
                self._refuse(context, method, error, begun)
            self._done(method, "OK", time.monotonic() - begun)
            return answer

        return guarded

    def _streamed(
        self, behaviour: Callable[[Any, Any], Generator[Any, None, None]], method: str
    ) -> Callable[[Any, Any], Any]:
        def guarded(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            begun = time.monotonic()
            try:
                self._check()
                with closing(behaviour(request, context)) as parts:
                    for part in parts:
                        with self._patience.waiting(context):
                            yield part
            except Exception as error:
                self._refuse(context, method, error, begun)
            self._done(method, "OK", time.monotonic() - begun)

        return guarded

    def _check(self) -> None:
        if not self._admit():
            raise Draining("the server is shutting down; try again soon")

    def _refuse(self, context: grpc.ServicerContext, method: str, error: Exception, begun: float) -> NoReturn:
        status, message, reason = answer_for(error)
        if isinstance(error, Draining):
            status = grpc.StatusCode.UNAVAILABLE
        if not context.is_active() and not isinstance(error, HubError):
            reason = "CANCELLED"  # the caller left, and whatever was raised came of that
        elif reason == INTERNAL_REASON:
            log.error("%s failed", method, exc_info=error)
        elif isinstance(error, HubUnavailable) and str(error) != message:
            log.error("%s: %s", method, error)  # in full here, and only here
        self._done(method, reason, time.monotonic() - begun)
        context.set_trailing_metadata(trailing(status, message, reason))
        context.abort(status, message)
        raise AssertionError("abort returned")


class Draining(ServerBusy):
    """The server takes no new calls; it, or another one behind the same address, will soon."""

    reason = DRAINING_REASON
