"""Which adapters are where: hub -> host memory -> arena rows, with leases for requests in flight.

A loader thread does everything slow, so the step loop never waits: it asks for a `Ticket`, goes on, and finds the
ticket ready at a later step. Rows are leased to tickets; an adapter without leases may be evicted (least recently
used first), one with leases never.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from server.adapters.arena import Arena, Rows, blocks
from server.adapters.parts import AdapterParts
from server.adapters.weights import AdapterFetch, AdapterFiles, LoraWeights
from server.errors import Draining, InvalidRequest, RequestTooLarge, ServerError

log = logging.getLogger(__name__)


class Tier(enum.Enum):
    """How near to the batch an adapter is."""

    LOADING = "loading"
    HOST = "host"
    DEVICE = "device"


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter as `List` shows it."""

    digest: str
    version: str  # the name it was last asked for by
    tier: Tier
    rank: int
    host_bytes: int
    device_bytes: int
    requests_in_flight: int
    draining: bool
    warnings: tuple[str, ...]


@dataclass
class Ticket:
    """A claim on several adapters at once. When `ready`, all of them are on the device and stay until `release`."""

    digests: tuple[str, ...]
    versions: tuple[str, ...]
    ready: bool = False
    error: Exception | None = None
    cancelled: bool = False
    held: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class _Resident:
    rows: Rows
    rank: int
    version: str
    warnings: tuple[str, ...]
    parts: AdapterParts
    leases: int = 0
    draining: bool = False


class Residency:
    """The adapters in host memory and in the arena.

    `parse` turns the hub's files into weights (raising what the request shall see). `wake` is called from the
    loader thread whenever a ticket became ready or failed. All public methods may be called from any thread.
    """

    def __init__(
        self,
        arena: Arena,
        fetch: AdapterFetch,
        parse: Callable[[AdapterFiles], LoraWeights],
        host_bytes: int,
        wake: Callable[[], None],
        loaded: Callable[[str, float], None],
        parts_bytes: int = 0,
    ) -> None:
        self._arena = arena
        self._fetch = fetch
        self._parse = parse
        self._host_budget = host_bytes
        self._parts_budget = parts_bytes
        self._wake = wake
        self._loaded = loaded
        self._changed = threading.Condition()
        self._device: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._host: OrderedDict[str, LoraWeights] = OrderedDict()
        self._writing: Rows | None = None  # allocated, being copied into, not yet in _device
        self._queue: deque[Ticket] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._load_loop, name="loraplex-loader", daemon=True)
        self._thread.start()

    # -- for the step loop ------------------------------------------------------------------------------------

    def acquire(self, digests: Sequence[str], versions: Sequence[str]) -> Ticket:
        """Claim adapters; the ticket is ready at once when all are on the device, else the loader sees to it."""
        ticket = Ticket(tuple(digests), tuple(versions))
        with self._changed:
            if all(digest in self._device for digest in ticket.digests):
                for digest in ticket.digests:
                    self._lease(digest, ticket)
                ticket.ready = True
            elif self._closed:
                ticket.error = Draining("the server is shutting down")
            else:
                self._queue.append(ticket)
                self._changed.notify_all()
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Give a ticket back, ready or not; idempotent."""
        with self._changed:
            ticket.cancelled = True
            self._return(ticket)
            # The first in the queue is the loader's: it notices `cancelled` and takes the ticket out itself.
            if ticket in self._queue and self._queue[0] is not ticket:
                self._queue.remove(ticket)
            self._changed.notify_all()

    def rows(self, digest: str) -> tuple[int, int]:
        """First and one past the last arena row in use by a leased adapter."""
        with self._changed:
            resident = self._device[digest]
            return resident.rows.start, resident.rows.start + blocks(resident.rank)

    def parts(self, uses: Sequence[tuple[str, str, float]]) -> tuple[tuple[AdapterParts, float], ...]:
        """The parts of leased adapters (digest, version, weight) that have any, each with its weight.

        Raises `InvalidRequest` where an adapter's parts have no meaning at that weight or in that company.
        """
        with self._changed:
            found = [(self._device[digest].parts, version, weight) for digest, version, weight in uses]
        for parts, version, weight in found:
            if parts.alone and (len(uses) > 1 or weight != 1.0):
                raise InvalidRequest(
                    f"{version} uses {', '.join(parts.alone)}, which replaces values of the base: it can be used only "
                    "alone and with weight 1"
                )
        return tuple((parts, weight) for parts, _, weight in found if parts.modules and weight)

    # -- for administration ------------------------------------------------------------------------------------

    def load(self, digest: str, version: str) -> AdapterStatus:
        """Bring an adapter onto the device and wait for it. Raises what made it impossible."""
        ticket = self.acquire((digest,), (version,))
        with self._changed:
            self._changed.wait_for(lambda: ticket.ready or ticket.error is not None)
            self.release(ticket)
            if ticket.error is not None:
                raise ticket.error
            return self._status(digest)

    def unload(self, digest: str) -> bool:
        """Free an adapter everywhere. False: requests still use it, it goes when the last of them ends."""
        with self._changed:
            self._host.pop(digest, None)
            resident = self._device.get(digest)
            if resident is None:
                return True
            resident.draining = True
            if resident.leases:
                return False
            self._drop(digest)
            self._changed.notify_all()
            return True

    def list(self) -> list[AdapterStatus]:
        """Every adapter that holds memory or is on its way."""
        with self._changed:
            loading = [
                AdapterStatus(digest, version, Tier.LOADING, 0, 0, 0, 0, False, ())
                for ticket in self._queue
                for digest, version in zip(ticket.digests, ticket.versions, strict=True)
            ]
            known = {*self._device, *self._host}
            return [self._status(digest) for digest in known] + [
                status for status in {s.digest: s for s in loading}.values() if status.digest not in known
            ]

    def close(self) -> None:
        """End the loader thread; tickets still waiting fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def check_integrity(self) -> None:
        """Raise AssertionError unless rows, leases and budgets add up."""
        with self._changed:
            owned = {digest: resident.rows for digest, resident in self._device.items()}
            if self._writing is not None:
                owned[""] = self._writing
            self._arena.check_integrity(owned)
            if any(resident.leases < 0 for resident in self._device.values()):
                raise AssertionError("an adapter was released more often than leased")

    @property
    def rows_total(self) -> int:
        """Rows of the arena."""
        return self._arena.rows

    def leases(self) -> int:
        """Leases given out and not yet returned."""
        with self._changed:
            return sum(resident.leases for resident in self._device.values())

    # -- the loader thread --------------------------------------------------------------------------------------

    def _load_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    for ticket in self._queue:
                        ticket.error = Draining("the server is shutting down")
                    self._queue.clear()
                    self._changed.notify_all()
                    return
                ticket = self._queue[0]
            try:
                # In order, and only the first in the queue may hold some of its adapters while it waits for
                # more rows: two half-served tickets waiting for each other cannot happen.
                for digest, version in zip(ticket.digests, ticket.versions, strict=True):
                    self._bring(digest, version, ticket)
            except Exception as error:
                if not isinstance(error, ServerError) and not hasattr(error, "reason"):
                    log.exception("loading an adapter failed")
                self._settle(ticket, error)
            else:
                self._settle(ticket, None)
            self._wake()

    def _settle(self, ticket: Ticket, error: Exception | None) -> None:
        with self._changed:
            self._queue.popleft()
            ticket.error = error
            ticket.ready = error is None and not ticket.cancelled
            if not ticket.ready:
                self._return(ticket)
            self._changed.notify_all()

    def _bring(self, digest: str, version: str, ticket: Ticket) -> None:
        """Put one adapter on the device and lease it to the ticket; does nothing once the ticket is cancelled."""
        with self._changed:
            if ticket.cancelled:
                return
            if digest in self._device:
                self._lease(digest, ticket)
                return
            weights = self._host.get(digest)
        if weights is None:
            started = time.monotonic()
            weights = self._parse(self._fetch(digest))
            self._keep_on_host(weights)
            self._loaded("host", time.monotonic() - started)
        started = time.monotonic()
        rows = self._find_rows(weights, ticket)
        if rows is None:
            return
        self._arena.write(rows, weights)
        parts = weights.parts.on(self._arena.device)
        with self._changed:
            self._writing = None
            self._device[digest] = _Resident(rows, weights.rank, version, weights.warnings, parts)
            if not ticket.cancelled:
                self._lease(digest, ticket)
        self._loaded("device", time.monotonic() - started)

    def _keep_on_host(self, weights: LoraWeights) -> None:
        with self._changed:
            self._host[weights.digest] = weights
            held = sum(other.bytes for other in self._host.values())
            while held > self._host_budget and len(self._host) > 1:
                _, dropped = self._host.popitem(last=False)
                held -= dropped.bytes

    def _find_rows(self, weights: LoraWeights, ticket: Ticket) -> Rows | None:
        """Rows for an adapter, evicting what nobody leases, else waiting; None when the ticket was cancelled."""
        if blocks(weights.rank) > self._arena.rows:
            raise RequestTooLarge(
                f"the adapter needs {blocks(weights.rank)} rows, the server's adapter memory has {self._arena.rows}"
            )
        if weights.parts.bytes > self._parts_budget:
            raise RequestTooLarge(
                f"the adapter brings {weights.parts.bytes} bytes beside its LoRA rows, the server has room for "
                f"{self._parts_budget} (--adapter-parts-memory)"
            )
        with self._changed:
            while not ticket.cancelled:
                held = sum(resident.parts.bytes for resident in self._device.values())
                fits = held + weights.parts.bytes <= self._parts_budget
                rows = self._arena.allocate(weights.rank) if fits else None
                if rows is not None:
                    self._writing = rows
                    return rows
                idle = next(
                    (
                        digest
                        for digest, resident in self._device.items()
                        if not resident.leases and (fits or resident.parts.bytes)
                    ),
                    None,
                )
                if idle is not None:
                    self._drop(idle)
                    continue
                if self._held_alone(ticket):
                    raise RequestTooLarge("the request's adapters together need more rows than the server has")
                if self._closed:
                    raise Draining("the server is shutting down")
                self._changed.wait()
        return None

    def _held_alone(self, ticket: Ticket) -> bool:
        """Whether only this ticket holds rows, so that waiting longer cannot help."""
        return all(resident.leases <= ticket.held.count(digest) for digest, resident in self._device.items())

    # -- under the lock -----------------------------------------------------------------------------------------

    def _lease(self, digest: str, ticket: Ticket) -> None:
        resident = self._device[digest]
        resident.leases += 1
        resident.draining = False  # somebody names it again
        self._device.move_to_end(digest)
        ticket.held.append(digest)
        ticket.warnings += [f"{resident.version}: {warning}" for warning in resident.warnings]

    def _return(self, ticket: Ticket) -> None:
        held, ticket.held = ticket.held, []
        for digest in held:
            resident = self._device[digest]
            resident.leases -= 1
            if resident.draining and not resident.leases:
                self._drop(digest)

    def _drop(self, digest: str) -> None:
        self._arena.free(self._device.pop(digest).rows)

    def _status(self, digest: str) -> AdapterStatus:
        resident, weights = self._device.get(digest), self._host.get(digest)
        row = self._arena.row_bytes
        return AdapterStatus(
            digest=digest,
            version=resident.version if resident else "",
            tier=Tier.DEVICE if resident else Tier.HOST,
            rank=resident.rank if resident else weights.rank if weights else 0,
            host_bytes=weights.bytes if weights else 0,
            device_bytes=(resident.rows.stop - resident.rows.start) * row + resident.parts.bytes if resident else 0,
            requests_in_flight=resident.leases if resident else 0,
            draining=bool(resident and resident.draining),
            warnings=resident.warnings if resident else weights.warnings if weights else (),
        )
