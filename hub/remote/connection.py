"""One channel to a shared hub: who calls goes along, errors come back as the hub's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import grpc

from hub.errors import HubUnavailable
from hub.remote.address import Address
from hub.remote.status import error_of, is_away, is_unknown
from protos.loraplex.v1 import registry_pb2_grpc

CALL_SECONDS: Final = 15.0  # a short call's deadline
PATIENCE_SECONDS: Final = 30.0  # how long a transfer that was cut tries to go on without a byte getting through
CHUNK_BYTES: Final = 512 * 1024  # of a file, in one message; each is copied some times, which more of them made slower
_ACTOR_KEY: Final = "loraplex-actor-bin"
T = TypeVar("T")


class Connection:
    """Calls to one server; safe to use from several threads. Connects when first used, and again when cut."""

    def __init__(self, address: Address, token: str | None, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.address = address
        self.has_token = token is not None
        self.patience_seconds = patience_seconds
        self._token = token
        options = [
            ("grpc.max_receive_message_length", 64 * 1024 * 1024),
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # How long one attempt may take, not how long to wait between two.
            ("grpc.min_reconnect_backoff_ms", 5_000),
            ("grpc.max_reconnect_backoff_ms", 2_000),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if address.tls:
            self._channel = grpc.secure_channel(address.authority, _credentials(address), options)
        else:
            self._channel = grpc.insecure_channel(address.authority, options)
        self.stub: Any = registry_pb2_grpc.RegistryStub(self._channel)  # type: ignore[no-untyped-call]

    def metadata(self, actor: str | None) -> tuple[tuple[str, str | bytes], ...]:
        """What goes along with a call made for `actor`."""
        said: list[tuple[str, str | bytes]] = []
        if self._token is not None:
            said.append(("authorization", f"Bearer {self._token}"))
        if actor is not None:
            said.append((_ACTOR_KEY, actor.encode()))
        return tuple(said)

    def call(self, method: str, request: Any, actor: str | None = None, seconds: float | None = CALL_SECONDS) -> Any:
        """The answer to a short call; raises the hub's errors, HubUnavailable where the server is away."""
        try:
            return getattr(self.stub, method)(request, timeout=seconds, metadata=self.metadata(actor))
        except grpc.RpcError as error:
            raise _raised(error) from error

    def call_that_ends(self, method: str, request: Any, actor: str | None, stop: Stop) -> Any:
        """As `call`, without a deadline, until `stop`; raises Stopped then."""
        stop.check()
        running = getattr(self.stub, method).future(request, metadata=self.metadata(actor))
        with stop.ends(running):
            try:
                return running.result()
            except grpc.FutureCancelledError as error:
                stop.check()
                raise ServerAway("the call was cancelled") from error
            except grpc.RpcError as error:
                raise _raised(error) from error

    def stream(self, method: str, request: Any, actor: str | None = None) -> Iterator[Any]:
        """The messages of an answer, as they come; raises as `call` does."""
        try:
            yield from getattr(self.stub, method)(request, metadata=self.metadata(actor))
        except grpc.RpcError as error:
            raise _raised(error) from error

    def persist(self, attempt: Callable[[], T], progress: Callable[[], int]) -> T:
        """`attempt`, again and again while the server is away, as long as `progress` (bytes) grows now and then."""
        last, since, wait = progress(), time.monotonic(), 0.1
        while True:
            try:
                return attempt()
            except ServerAway:
                now = progress()
                if now != last:
                    last, since, wait = now, time.monotonic(), 0.1
                if time.monotonic() - since + wait > self.patience_seconds:
                    raise
                time.sleep(wait)
                wait = min(2 * wait, 2.0)

    def close(self) -> None:
        """End it; running calls are cancelled."""
        self._channel.close()


class Stopped(Exception):
    """What was under way is wanted no more."""


class Stop:
    """Ends what is under way, from another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = False
        self._running: Any = None

    def now(self) -> None:
        """Cancel the call that runs; none begins after this."""
        with self._lock:
            self._stopped = True
            if self._running is not None:
                self._running.cancel()

    def check(self) -> None:
        """Raise Stopped after `now`."""
        if self._stopped:
            raise Stopped

    @contextmanager
    def ends(self, call: Any) -> Iterator[None]:
        """`now` cancels this call meanwhile."""
        with self._lock:
            self._running = call
            if self._stopped:
                call.cancel()
        try:
            yield
        finally:
            with self._lock:
                self._running = None


class ServerAway(HubUnavailable):
    """No answer came from the shared server; what is cached can be used, and trying again may help."""


class CallUnknown(HubUnavailable):
    """What answers has no such call: a server of an older release, or no hub's at all."""


def _raised(error: grpc.RpcError) -> Exception:
    raised = error_of(error)
    if is_unknown(error):
        return CallUnknown(str(raised))
    if not is_away(error):
        return raised
    return ServerAway(raised.public, raised.detail) if isinstance(raised, HubUnavailable) else ServerAway(str(raised))


def _credentials(address: Address) -> grpc.ChannelCredentials:
    if address.ca is None:
        return grpc.ssl_channel_credentials()
    try:
        return grpc.ssl_channel_credentials(address.ca.read_bytes())
    except OSError as error:
        raise HubUnavailable(f"{address.ca} cannot be read: {error.strerror}") from error
