"""Host memory -> arena rows: one thread, one ticket after the other in their order of arrival.

Only that ticket may hold some of its adapters while it waits for rows, so two half-served tickets never wait for each
other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from server.adapters.arena import Rows
from server.adapters.claims import Claims
from server.adapters.device_cache import Resident
from server.adapters.load_pace import LoadPace
from server.adapters.priority import give_way
from server.adapters.tickets import Ticket
from server.adapters.weights import LoraWeights
from server.errors import Draining, RequestTooLarge, ServerError

log = logging.getLogger(__name__)


class DeviceLoader:
    """The placing thread; it runs from the start until the claims are closed."""

    def __init__(
        self,
        claims: Claims,
        fetch_more: Callable[[], None],
        wake: Callable[[], None],
        loaded: Callable[[str, float], None],
        pace: LoadPace,
    ) -> None:
        self._claims = claims
        self._fetch_more = fetch_more
        self._wake = wake
        self._loaded = loaded
        self._pace = pace
        self._thread = threading.Thread(target=self._loop, name="loraplex-loader", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread to end; the claims are closed."""
        self._thread.join()

    def _loop(self) -> None:
        give_way()
        claims = self._claims
        while True:
            with claims.changed:
                claims.changed.wait_for(lambda: claims.closed or self._placeable() is not None)
                if claims.closed:
                    return
                ticket = claims.placing = self._placeable()
            assert ticket is not None
            error = None
            try:
                self._place(ticket)
            except Exception as raised:
                error = raised
                if not isinstance(error, ServerError):
                    log.exception("placing an adapter failed")
            with claims.changed:
                claims.placing = None
                if error is not None and ticket in claims.queue:
                    claims.settle(ticket, error)
                elif ticket in claims.queue and len(ticket.held) == len(ticket.digests):
                    claims.settle(ticket, None)
                else:
                    claims.give_back(ticket)  # cancelled, or unloaded under way: then it waits for another fetch
                claims.serve_resident()
                self._fetch_more()
            self._wake()

    def _placeable(self) -> Ticket | None:
        """The first ticket all of whose adapters are parsed or on the device."""
        claims = self._claims
        for ticket in claims.queue:
            if all(digest in claims.device or digest in claims.host for digest in ticket.digests):
                return ticket
        return None

    def _place(self, ticket: Ticket) -> None:
        """Put a ticket's adapters on the device and lease them to it, as far as that is to be now.

        Those that are there lie where they lie, and may leave room only in pieces; then all of them are placed anew.
        """
        claims = self._claims
        with claims.changed:
            wanted: dict[str, Resident | LoraWeights] = {}
            for digest in ticket.digests:
                known = claims.device.get(digest) or claims.host.get(digest)
                if known is None:
                    return  # unloaded meanwhile: it is being fetched again
                wanted[digest] = known
            claims.device.refuse_oversized(wanted)  # before anybody makes room in vain
        try:
            self._bring_all(ticket, wanted)
        except RequestTooLarge:
            if not self._take_away(ticket):
                raise
            self._bring_all(ticket, wanted)

    def _bring_all(self, ticket: Ticket, wanted: Mapping[str, Resident | LoraWeights]) -> None:
        """Those on the device first, for they are not to be evicted for the others; then the largest first."""
        named = list(zip(ticket.digests, ticket.versions, strict=True))
        with self._claims.changed:
            device = self._claims.device
            named.sort(key=lambda one: (one[0] not in device, -wanted[one[0]].rank))
        for digest, version in named:
            if not self._bring(digest, version, ticket):
                return

    def _take_away(self, ticket: Ticket) -> bool:
        """Clear the device of a ticket's adapters, waiting for those who use them; False when none of them can go.

        Whoever else can go has gone by now, and nobody else places anything: what fits is certain to find room then,
        unless pinned adapters lie in between.
        """
        claims = self._claims
        with claims.changed:
            claims.give_back(ticket)
            mine = [d for d in ticket.digests if d in claims.device and d not in claims.device.pinned]
            while ticket in claims.queue and claims.device.clear(mine):
                if claims.closed:
                    raise Draining("the server is shutting down")
                claims.changed.wait()
            claims.dropped()
        return bool(mine)

    def _bring(self, digest: str, version: str, ticket: Ticket) -> bool:
        """Put one adapter on the device and lease it to the ticket; False when that is not to be now."""
        claims = self._claims
        with claims.changed:
            if ticket not in claims.queue:
                return False
            resident = claims.device.get(digest)
            if resident is not None:
                # Should it have been about to make room for others: its turn came again before that happened.
                claims.lease(digest, ticket)
                if resident.yielding:
                    resident.yielding = False
                    claims.serve_resident()
                return True
            weights = claims.host.get(digest)
        if weights is None:
            return False
        started = time.monotonic()
        rows = self._find_rows(weights, ticket)
        if rows is None:
            return False
        arena = claims.device.arena
        try:
            with arena.aside(), self._pace.charged():
                arena.write(rows, weights)
                parts = weights.parts.on(arena.device)
        except BaseException:
            with claims.changed:
                claims.device.abandon(rows)
            raise
        with claims.changed:
            claims.device.put(weights, version, rows, parts)
            claims.evict_from_host()  # it may go from there now
            if ticket in claims.queue:
                claims.lease(digest, ticket)
        self._loaded("device", time.monotonic() - started)
        return True

    def _find_rows(self, weights: LoraWeights, ticket: Ticket) -> Rows | None:
        """Rows for an adapter, waiting for some to be given back; None when the ticket was cancelled."""
        claims = self._claims
        with claims.changed:
            while ticket in claims.queue:
                rows = claims.device.allocate(weights)
                claims.dropped()  # what it evicted
                if rows is not None:
                    return rows
                if claims.closed:
                    raise Draining("the server is shutting down")
                if not claims.device.ask_to_yield(but=ticket.held):
                    raise RequestTooLarge("the request's adapters together need more rows than the server can free")
                claims.changed.wait()
        return None
