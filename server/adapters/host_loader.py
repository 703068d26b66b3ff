"""Hub -> host memory: adapters that tickets wait for, several side by side, so that a slow hub delays only who needs
it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

from server.adapters.claims import Claims
from server.adapters.fetching import FetchThreads
from server.adapters.load_pace import LoadPace
from server.adapters.tickets import Ticket
from server.adapters.weights import AdapterFetch, AdapterFiles, LoraWeights
from server.errors import ServerError

log = logging.getLogger(__name__)


class HostLoader:
    """Fetches and parses in threads of its own, `fetches` at once.

    `wake` is called without the lock, for who wakes may hold one that tickets are made under.
    """

    def __init__(
        self,
        claims: Claims,
        fetch: AdapterFetch,
        parse: Callable[[AdapterFiles], LoraWeights],
        fetches: int,
        wake: Callable[[], None],
        loaded: Callable[[str, float], None],
        pace: LoadPace,
    ) -> None:
        self.fetching: dict[str, bool] = {}  # digest -> whether to keep what comes; under the claims' lock
        self._claims = claims
        self._fetch = fetch
        self._parse = parse
        self._fetches = fetches
        self._wake = wake
        self._loaded = loaded
        self._pace = pace
        self._threads = FetchThreads(fetches, "loraplex-fetch")

    def fetch_more(self) -> None:
        """Under the lock: start fetches in the tickets' order. Parsed adapters that wait for rows may fill the host's
        budget once; the first ticket need not care, so that there is always one that can be completed."""
        claims = self._claims
        if claims.closed:
            return
        full: bool | None = None
        for i, ticket in enumerate(claims.queue):
            if len(self.fetching) >= 2 * self._fetches:
                return
            if i > 0 and full is None:
                full = self._waiting_bytes() >= claims.host.budget
            if full:
                return
            self._start(ticket)

    def forget(self, digest: str) -> None:
        """Under the lock: do not keep what is being fetched, unless somebody waits for it."""
        if digest in self.fetching:
            self.fetching[digest] = False

    def close(self) -> None:
        """End the threads; does not wait for a hub that hangs."""
        self._pace.close()
        self._threads.close()

    def _start(self, ticket: Ticket) -> None:
        claims = self._claims
        for digest in ticket.digests:
            if digest not in claims.device and digest not in claims.host and digest not in self.fetching:
                self.fetching[digest] = True
                self._threads.run(partial(self._fetch_one, digest))

    def _fetch_one(self, digest: str) -> None:
        claims = self._claims
        with claims.changed:
            if not claims.wanted(digest):
                del self.fetching[digest]
                self.fetch_more()
                return
        started = time.monotonic()
        weights, error = None, None
        try:
            with self._pace.turn():
                weights = self._parse(self._fetch(digest))
        except Exception as raised:
            error = raised
            if not isinstance(error, ServerError) and not hasattr(error, "reason"):
                log.exception("loading an adapter failed")
        with claims.changed:
            keep = self.fetching.pop(digest)
            if weights is not None and (keep or claims.wanted(digest)):
                claims.host.put(weights)
                claims.evict_from_host()
            if error is not None:
                for ticket in [t for t in claims.queue if digest in t.digests and digest not in t.held]:
                    claims.settle(ticket, error)
            self.fetch_more()
            claims.changed.notify_all()
        self._wake()
        if weights is not None:
            self._loaded("host", time.monotonic() - started)

    def _waiting_bytes(self) -> int:
        claims = self._claims
        wanted = {digest for ticket in claims.queue for digest in ticket.digests if digest not in claims.device}
        return sum(weights.bytes for digest, weights in claims.host.items() if digest in wanted)
