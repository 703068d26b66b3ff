"""Leases on the versions this server holds, so that nobody removes them from the hub meanwhile.

A lease is taken when a version is fetched, renewed while its bytes are in memory or on the device, and given back when
they left. A server that dies renews nothing, so its leases run out by themselves. Leases are a courtesy to others:
what is loaded is served with or without one, and no request waits for one.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from hub.errors import AdapterNotFound, Forbidden, HubError, HubReadOnly

if TYPE_CHECKING:
    from hub.facade import HubFacade

log = logging.getLogger(__name__)
LEASE_SECONDS: Final = 600.0
_CLOSING_SECONDS: Final = 5.0


class HubLeases:
    """One server's leases, kept by a thread of its own. Safe to use from any thread; `close` gives them back."""

    def __init__(self, hub: HubFacade, seconds: float = LEASE_SECONDS, *, look_seconds: float = 2.0) -> None:
        """Leases last `seconds` and are renewed when half of that has passed."""
        self.holder = f"hub serve on {socket.gethostname()[:100]} ({uuid.uuid4().hex[:8]})"
        self._hub = hub
        self._seconds = seconds
        self._look_seconds = look_seconds
        self._held: Callable[[], Collection[str]] | None = None
        self._lock = threading.Lock()
        self._fetched: dict[str, str] = {}  # digest -> reference, not leased yet
        self._leased: dict[str, tuple[str, float]] = {}  # digest -> reference, when it was leased (monotonic)
        self._quiet_until = 0.0  # the hub refused or did not answer: it is asked again after this
        self._warned = False
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loraplex-leases", daemon=True)
        self._thread.start()

    def fetched(self, full_name: str, digest: str) -> None:
        """The bytes of a version are on their way into this server; never blocks."""
        with self._lock:
            self._fetched[digest] = f"{full_name}@{digest}"
        self._wake.set()

    def follow(self, held: Callable[[], Collection[str]]) -> None:
        """Give leases back when their digests are not in `held()` any more."""
        self._held = held

    def close(self) -> None:
        """Give all leases back, as far as the hub answers within a few seconds, and end the thread."""
        self._stop.set()
        self._wake.set()
        self._thread.join(_CLOSING_SECONDS)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(self._look_seconds)
            self._wake.clear()
            if self._stop.is_set():
                break
            try:
                self._settle(time.monotonic())
            except HubError as error:
                self._refused(error)
            except Exception:
                log.exception("keeping leases failed; trying again")
                self._quiet_until = time.monotonic() + self._look_seconds
        self._give_all_back()

    def _settle(self, now: float) -> None:
        if now < self._quiet_until:
            return
        with self._lock:
            fetched = dict(self._fetched)
        # Looked at after the fetches: one that began in between is held by then, and its turn comes at the next look.
        held = self._held() if self._held is not None else None
        for digest in [each for each in self._leased if held is not None and each not in held]:
            self._release(digest)
        due = {each: ref for each, (ref, since) in self._leased.items() if now - since >= self._seconds / 2}
        for digest, ref in {**due, **fetched}.items():
            if held is None or digest in held:
                self._take(digest, ref)
            with self._lock:
                self._fetched.pop(digest, None)
        if self._warned:
            self._warned = False
            log.info("the hub gives leases again")

    def _take(self, digest: str, ref: str) -> None:
        now = time.monotonic()
        try:
            self._hub.lease(ref, self.holder, self._seconds)
        except AdapterNotFound:
            log.info("%s was removed from the hub while it was loaded here", ref)
            self._leased.pop(digest, None)
            return
        self._leased[digest] = (ref, now)

    def _release(self, digest: str) -> None:
        ref, _ = self._leased[digest]
        with suppress(AdapterNotFound):  # its lease ran out, and somebody was quicker
            self._hub.release(ref, self.holder)
        del self._leased[digest]

    def _refused(self, error: HubError) -> None:
        lasting = isinstance(error, (Forbidden, HubReadOnly))
        self._quiet_until = time.monotonic() + (self._seconds / 2 if lasting else self._look_seconds)
        if not self._warned:
            self._warned = True
            log.warning("no leases from the hub, versions held here can be removed there meanwhile: %s", error)

    def _give_all_back(self) -> None:
        try:
            for digest in list(self._leased):
                self._release(digest)
        except HubError as error:
            log.info("leases are left to run out: %s", error)
