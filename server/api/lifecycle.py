"""A server's life: bind, load, serve, drain, end.

The port is bound and health answers (NOT_SERVING) before the base is loaded, so a taken port fails in a moment and
a probe can tell "loading" from "dead". On SIGTERM health turns NOT_SERVING, new calls are refused with UNAVAILABLE
and running ones get `drain_seconds` to end; a second signal ends them at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import threading
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from protos.loraplex.v1 import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from server.adapters.directory import AdapterDirectory
from server.api.admission import Admission
from server.api.feedback import Feedback, KeptFeedback, NoFeedback
from server.api.grpc_service import AdaptersService, InferenceService
from server.api.interceptors import Loading, StatusInterceptor
from server.api.parse import RequestParser
from server.api.routing import Routing
from server.config import RequestLimits, ServerConfig
from server.errors import AddressUnavailable, Draining
from server.metrics import Metrics

if TYPE_CHECKING:
    from server.engine.engine import Engine

log = logging.getLogger(__name__)
T = TypeVar("T")

SERVICES = tuple(
    descriptor.full_name
    for descriptor in (
        inference_pb2.DESCRIPTOR.services_by_name["Inference"],
        adapters_pb2.DESCRIPTOR.services_by_name["Adapters"],
    )
)
# Health and reflection answer in every phase.
_GATED = tuple(f"/{name}/" for name in SERVICES)

KEEPALIVE_SECONDS = 30
KEEPALIVE_TIMEOUT_SECONDS = 10
MAX_STREAMS_PER_CONNECTION = 1024


class Phase(enum.Enum):
    """What a server does with new calls."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


class Server:
    """The gRPC server and the metrics page around one engine. Use on one event loop, in this order:
    `bind`, `serve_engine`, `drain`, `stop`; `stop` may come at any time after `bind`.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._phase = Phase.LOADING
        self._engine: Engine | None = None
        self._inference = _Late()
        self._adapters = _Late()
        self._closers: list[Callable[[], None]] = []
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in the stubs
        self._http: tuple[WSGIServer, threading.Thread] | None = None
        self.grpc_address = ""  # "127.0.0.1:50051" once bound
        self.metrics_url: str | None = None  # None: off
        self._server = grpc.aio.server(
            interceptors=[StatusInterceptor(metrics.error, self._admit)], options=server_options(config.requests)
        )

    async def bind(self) -> None:
        """Open both ports; health answers NOT_SERVING from here on. Raises `AddressUnavailable`."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        inference_pb2_grpc.add_InferenceServicer_to_server(self._inference, self._server)  # type: ignore[no-untyped-call]
        adapters_pb2_grpc.add_AdaptersServicer_to_server(self._adapters, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        host = self._config.listen.rpartition(":")[0]
        try:
            port = self._server.add_insecure_port(self._config.listen)
        except RuntimeError:
            port = 0
        if port == 0:
            raise AddressUnavailable(
                f"cannot listen on {self._config.listen}: the port is taken or the address is not this machine's"
            )
        self.grpc_address = f"{host}:{port}"
        if self._config.metrics_port >= 0:
            self._bind_metrics(host)
        await self._server.start()

    async def serve_engine(self, engine: Engine, directory: AdapterDirectory) -> None:
        """Answer calls with `engine`, which has been started.

        Raises `FeedbackDirectoryUnusable` and what `Routing.open` raises.
        """
        routing = Routing.open(self._config.routers, engine, self._metrics.routed)
        limits, base = self._config.requests, engine.base
        parser = RequestParser(
            limits=limits,
            max_adapters=self._config.engine.max_adapters_per_request,
            vocabulary_size=base.vocabulary_size,
            context_tokens=base.context_tokens,
            longest_token=engine.text.longest_token,
        )
        admission = Admission(
            parser, directory, engine.text, engine.structures, routing, max_pending=self._config.engine.max_waiting
        )
        administration = AdaptersService(engine, directory)
        self._closers += [admission.close, administration.close]
        feedback = await self._open_feedback(engine)
        self._closers.append(feedback.close)
        self._inference.servicer = InferenceService(
            engine, admission, parser, model_info(engine, self._config), feedback, self._config.tenant_header
        )
        self._adapters.servicer = administration
        self._engine = engine
        self._metrics.attach(engine.snapshot, lambda: residents(engine))
        self._metrics.serving(base.identity.name or self._config.model.base, base.quantization, version("loraplex"))
        self._phase = Phase.SERVING
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> bool:
        """Refuse new calls and let running ones end; True when all ended within `drain_seconds`."""
        self._phase = Phase.DRAINING
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._engine is None:
            return True
        return await in_daemon_thread(self._engine.drain, self._config.drain_seconds)

    async def stop(self, grace: float = 0.0) -> None:
        """Close the ports; calls still running get `grace` seconds, then end. Neither closes engine nor directory."""
        self._phase = Phase.DRAINING
        await self._server.stop(grace)
        for close in self._closers:
            close()
        if self._http is not None:
            (http, thread), self._http = self._http, None
            http.shutdown()
            http.server_close()
            thread.join()

    async def _open_feedback(self, engine: Engine) -> Feedback:
        if self._config.feedback is None:
            return NoFeedback()
        base = engine.base.identity.name or self._config.model.base
        feedback = KeptFeedback(self._config.feedback, engine.text, base, self._metrics.feedback)
        await feedback.start()
        return feedback

    def _bind_metrics(self, host: str) -> None:
        port = self._config.metrics_port
        try:
            self._http = start_http_server(port, host.strip("[]"), self._metrics.registry)
        except OSError as error:
            raise AddressUnavailable(f"cannot serve metrics on {host}:{port}: {error.strerror}") from error
        self.metrics_url = f"http://{host}:{self._http[0].server_port}/metrics"

    def _admit(self, method: str) -> None:
        if self._phase is Phase.SERVING or not method.startswith(_GATED):
            return
        if self._phase is Phase.LOADING:
            raise Loading("the base model is being loaded; try again soon")
        raise Draining("the server is shutting down")

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)


class _Late:
    """Stands in for a servicer that is set after registration; the interceptor lets nobody in before."""

    servicer: Any = None

    def __getattr__(self, name: str) -> Any:
        async def call(request: Any, context: Any) -> Any:
            return await getattr(self.servicer, name)(request, context)

        return call


def server_options(limits: RequestLimits) -> list[tuple[str, int]]:
    """gRPC's own limits."""
    return [
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        # Answers are bounded by the context and max_logprobs.
        ("grpc.max_send_message_length", -1),
        # Between the soft and the absolute limit gRPC refuses at random; equal, the limit is one limit.
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
        # Without this a second server would share the port and take half the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        # Clients that ping as often as ours do must not be sent away for it.
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIMEOUT_SECONDS * 1000),
    ]


def model_info(engine: Engine, config: ServerConfig) -> inference_pb2.ModelInfo:
    """What is served and the limits of a request."""
    base = engine.base
    return inference_pb2.ModelInfo(
        base=base.identity.name or config.model.base,
        revision=base.identity.revision or "",
        fingerprint=base.identity.fingerprint or "",
        architecture=base.architecture,
        quantization=base.quantization,
        dtype=str(base.dtype).removeprefix("torch."),
        vocabulary_size=base.vocabulary_size,
        context_tokens=base.context_tokens,
        default_max_new_tokens=config.requests.default_max_new_tokens,
        max_logprobs=config.requests.max_logprobs,
        max_adapter_rank=config.engine.max_adapter_rank,
        max_adapters_per_request=config.engine.max_adapters_per_request,
        server_version=version("loraplex"),
    )


def residents(engine: Engine) -> dict[str, int]:
    """How many adapters each tier holds; one on the device usually has its host copy too."""
    counts: Counter[str] = Counter()
    for status in engine.adapters.list():
        counts["device"] += status.device_bytes > 0
        counts["host"] += status.host_bytes > 0
    return {"device": counts["device"], "host": counts["host"]}


async def in_daemon_thread(work: Callable[..., T], *args: Any) -> T:
    """Await `work(*args)` run in a thread that does not keep the process alive, unlike an executor's."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work(*args)
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True, name=f"loraplex-{getattr(work, '__name__', 'work')}").start()
    return await done
