"""The shared server's life: bind, serve, drain, end. Calls run in threads: the hub's own methods block."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from hub.errors import HubUnavailable
from hub.hub import Hub
from hub.registry.answers import Answers
from hub.registry.feed import Feed
from hub.registry.metrics import RegistryMetrics
from hub.registry.patience import IDLE_SECONDS, Patience
from hub.registry.service import RegistryService, ServiceLimits
from hub.registry.tokens import TokenStore
from hub.registry.uploads import MAX_STAGED_BYTES, Uploads
from protos.loraplex.v1 import registry_pb2, registry_pb2_grpc

SERVICE: Final = registry_pb2.DESCRIPTOR.services_by_name["Registry"].full_name
MAX_MESSAGE_BYTES: Final = 8 * 1024 * 1024
MAX_METADATA_BYTES: Final = 16 * 1024
_SPARE_CALLS = 64  # short calls beside watches, transfers and checks


@dataclass(frozen=True)
class RegistryConfig:
    """How a shared server runs."""

    listen: str = "127.0.0.1:50052"  # port 0: any free one
    uploads: Path = Path("uploads")  # where unfinished pushes are kept
    tls_cert: Path | None = None  # PEM files; both or none
    tls_key: Path | None = None
    metrics_port: int = -1  # 0: any free one, -1: off
    drain_seconds: float = 30.0
    max_staged_bytes: int = MAX_STAGED_BYTES
    idle_seconds: float = IDLE_SECONDS  # a call whose caller sends and takes nothing for so long is ended
    limits: ServiceLimits = field(default_factory=ServiceLimits)


class RegistryServer:
    """A shared server around one hub; `tokens` None: everybody may do everything. Does not close the hub.

    Raises HubUnavailable where it cannot listen, or a TLS file cannot be used.
    """

    def __init__(self, hub: Hub, tokens: TokenStore | None, config: RegistryConfig) -> None:
        self._config = config
        self._metrics = RegistryMetrics()
        self._feed = Feed(hub)
        self._patience = Patience(config.idle_seconds)
        self._draining = threading.Event()
        limits = config.limits
        uploads = Uploads(config.uploads, max_staged_bytes=config.max_staged_bytes)
        self._service = RegistryService(hub, tokens, uploads, self._feed, self._patience, self._metrics, limits)
        threads = limits.max_watches + limits.max_transfers + limits.max_checks + _SPARE_CALLS
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="loraplex-registry"),
            interceptors=[Answers(self._metrics.done, lambda: not self._draining.is_set(), self._patience)],
            options=_options(),
        )
        self._health = health.HealthServicer()
        self._http: Any = None
        self.metrics_url: str | None = None
        registry_pb2_grpc.add_RegistryServicer_to_server(self._service, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)
        try:
            self.address = self._bind()
            self._bind_metrics()
        except BaseException:
            self._feed.close()
            self._patience.close()
            raise

    def start(self) -> Self:
        """Answer calls from here on."""
        self._server.start()
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return self

    def stop(self, grace: float | None = None) -> None:
        """Refuse new calls, end watches, give running calls `grace` seconds (None: as configured), end."""
        self._draining.set()
        self._health.enter_graceful_shutdown()
        self._service.closing.set()
        self._feed.close()  # watches wake and end
        self._server.stop(self._config.drain_seconds if grace is None else grace).wait()
        self._patience.close()
        if self._http is not None:
            (http, thread), self._http = self._http, None
            http.shutdown()
            http.server_close()
            thread.join()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(0)

    def _bind(self) -> str:
        listen = self._config.listen
        try:
            if self._config.tls_cert is not None and self._config.tls_key is not None:
                port = self._server.add_secure_port(listen, self._credentials())
            else:
                port = self._server.add_insecure_port(listen)
        except RuntimeError:
            port = 0
        if port == 0:
            raise HubUnavailable(
                f"cannot listen on {listen}: the port is taken, the address is not this machine's, or the certificate "
                "and key do not fit"
            )
        return f"{listen.rpartition(':')[0]}:{port}"

    def _credentials(self) -> grpc.ServerCredentials:
        """Read anew for every connection that follows a change of the files: certificates are renewed in place."""
        first = self._read_pair()
        seen = [first]

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            try:
                pair = self._read_pair()
            except HubUnavailable:
                return None  # half replaced: the old ones go on
            if pair == seen[0]:
                return None
            seen[0] = pair
            return grpc.ssl_server_certificate_configuration([pair])

        return grpc.dynamic_ssl_server_credentials(grpc.ssl_server_certificate_configuration([first]), fetch)  # type: ignore[arg-type]  # None: no change

    def _read_pair(self) -> tuple[bytes, bytes]:
        assert self._config.tls_key is not None and self._config.tls_cert is not None
        try:
            return self._config.tls_key.read_bytes(), self._config.tls_cert.read_bytes()
        except OSError as error:
            raise HubUnavailable(f"{error.filename} cannot be read: {error.strerror}") from error

    def _bind_metrics(self) -> None:
        if self._config.metrics_port < 0:
            return
        host = self._config.listen.rpartition(":")[0].strip("[]")
        try:
            self._http = start_http_server(self._config.metrics_port, host, self._metrics.registry)
        except OSError as error:
            raise HubUnavailable(
                f"cannot serve metrics on port {self._config.metrics_port}: {error.strerror}"
            ) from error
        self.metrics_url = f"http://{host}:{self._http[0].server_port}/metrics"


def _options() -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        # Without this a second server would share the port and take half the calls.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
