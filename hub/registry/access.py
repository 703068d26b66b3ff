"""What every call of the shared server asks first: who calls, as whom they write, and whether there is a place."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc

from hub.errors import AdapterNotFound, RefInvalid, ServerBusy
from hub.hub import Hub
from hub.refs import AdapterRef, Digest
from hub.registry.feed import Feed
from hub.registry.grants import Caller, anyone
from hub.registry.patience import Patience
from hub.registry.tokens import TokenStore
from hub.registry.uploads import Uploads
from hub.versions import Version
from protos.loraplex.v1 import registry_pb2_grpc

ACTOR_KEY: Final = "loraplex-actor-bin"
Context = grpc.ServicerContext


class Observer(Protocol):
    """What is told of the work done."""

    def moved(self, direction: str, count: int) -> None:
        """Bytes went "in" or "out"."""

    def watching(self, change: int) -> None:
        """A watch began (1) or ended (-1)."""


@dataclass(frozen=True)
class ServiceLimits:
    """What one server does at a time."""

    max_watches: int = 128
    max_transfers: int = 64
    max_checks: int = 2  # verify, fsck and sweep read much


class Access(registry_pb2_grpc.RegistryServicer):
    """One hub for many callers, without its calls. `tokens` None: everybody may do everything."""

    def __init__(
        self, hub: Hub, tokens: TokenStore | None, uploads: Uploads, feed: Feed, patience: Patience, observer: Observer,
        limits: ServiceLimits | None = None,
    ) -> None:  # fmt: skip
        limits = limits or ServiceLimits()
        self._hub = hub
        self._tokens = tokens
        self._uploads = uploads
        self._feed = feed
        self._patience = patience
        self._observer = observer
        self._watches = threading.BoundedSemaphore(limits.max_watches)
        self._transfers = threading.BoundedSemaphore(limits.max_transfers)
        self._checks = threading.BoundedSemaphore(limits.max_checks)
        self.closing = threading.Event()

    def _caller(self, context: Context) -> Caller:
        if self._tokens is None:
            return anyone()
        values = [value for key, value in context.invocation_metadata() if key == "authorization"]
        scheme, _, text = str(values[0]).partition(" ") if len(values) == 1 else ("", "", "")
        return self._tokens.authenticate(text if scheme.lower() == "bearer" else "")

    def _acting(self, caller: Caller, context: Context) -> Hub:
        """The hub, writing as the token's subject, and as whom the client says it acts for."""
        said = [value for key, value in context.invocation_metadata() if key == ACTOR_KEY]
        try:
            value = said[0] if said else b""
            name = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise RefInvalid("the actor is no text") from error
        if len(name) > 200 or not name.isprintable():
            raise RefInvalid("an actor is a printable line of at most 200 characters")
        if self._tokens is None:
            return self._hub.acting_as(name or caller.subject)
        return self._hub.acting_as(f"{caller.subject} for {name}" if name else caller.subject)

    def _readable(self, caller: Caller, digest: Digest) -> Version:
        unknown = AdapterNotFound(f"there is no version {digest} in this hub")
        try:
            version = self._hub.get(digest)
        except AdapterNotFound as error:
            # "Removed" is told only to who could read it: the message names the version.
            if caller.may_everywhere("read"):
                raise
            raise unknown from error
        if not caller.may("read", version.full_name):
            raise unknown
        return version

    def _asked_name(self, request: Any) -> str | None:
        return AdapterRef.parse(request.full_name).full_name if request.HasField("full_name") else None


class one_of:  # noqa: N801  # reads as a statement: with one_of(...)
    """One of a few places, or ServerBusy at once."""

    def __init__(self, places: threading.BoundedSemaphore, what: str) -> None:
        self._places, self._what = places, what

    def __enter__(self) -> None:
        if not self._places.acquire(blocking=False):
            raise ServerBusy(f"the server has as many {self._what} running as it may; try again later")

    def __exit__(self, *error: object) -> None:
        self._places.release()


class CallEnded(Exception):
    """The caller left, or its deadline passed: nobody reads what the call would answer."""


def check_wanted(context: Context) -> None:
    """Raise CallEnded where nobody waits for the answer any more; long work asks now and then."""
    if not context.is_active():
        raise CallEnded
