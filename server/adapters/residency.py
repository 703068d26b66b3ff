"""Which adapters are where: hub -> host memory -> arena rows, with leases for requests in flight.

Threads do everything slow, so the step loop never waits: it asks for a `Ticket`, goes on, and finds the ticket ready
at a later step. Fetching and parsing happen side by side (`adapter_fetches` at once), so a slow hub delays only who
needs it. One thread places parsed adapters into rows, one ticket after the other in their order of arrival: only that
ticket may hold some of its adapters while it waits for rows, so two half-served tickets never wait for each other.

Rows are leased to tickets. An adapter without leases may be evicted (least recently used first), one with leases or a
pin never. When all rows are leased and a ticket waits for some, the adapter longest not asked for *yields*: tickets
of requests that do not run yet, and had their chance to, give their leases back and queue again, new ones queue, and
the rows are free when the running requests end. Without that, a popular adapter would keep its rows for ever.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from server.adapters.arena import Arena, Rows, blocks
from server.adapters.fetching import FetchThreads
from server.adapters.parts import AdapterParts
from server.adapters.weights import AdapterFetch, AdapterFiles, LoraWeights
from server.errors import AdapterInUse, Draining, InvalidRequest, RequestTooLarge, ServerError

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
    pinned: bool = False


@dataclass(eq=False)
class Ticket:
    """A claim on several adapters at once. While `ready`, all of them are on the device.

    From `begin` to `pause` or `release` they stay there; outside, `ready` may become false again.
    """

    digests: tuple[str, ...]
    versions: tuple[str, ...]
    ready: bool = False
    error: Exception | None = None
    cancelled: bool = False
    running: bool = False
    passed_over: bool = False  # it was ready when a step was scheduled, and was not begun
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
    draining: bool = False  # unloaded while in use: goes with its last lease
    yielding: bool = False  # gives no new leases until its rows were given to another


class Residency:
    """The adapters in host memory and in the arena.

    `parse` turns the hub's files into weights (raising what the request shall see). `wake` is called from other
    threads whenever a ticket became ready or failed. All public methods may be called from any thread.
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
        fetches: int = 8,
    ) -> None:
        self._arena = arena
        self._fetch = fetch
        self._parse = parse
        self._host_budget = host_bytes
        self._parts_budget = parts_bytes
        self._wake = wake
        self._loaded = loaded
        self._fetches = fetches
        self._changed = threading.Condition()
        self._device: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._host: OrderedDict[str, LoraWeights] = OrderedDict()
        self._pinned: set[str] = set()
        self._writing: tuple[str, Rows] | None = None  # allocated, being copied into, not yet in _device
        self._queue: dict[Ticket, None] = {}  # tickets not ready, in order of arrival
        self._ready: dict[Ticket, None] = {}  # tickets with all their leases that do not run
        self._running: set[Ticket] = set()
        self._placing: Ticket | None = None  # of _queue: the only one that may hold leases
        self._fetching: dict[str, bool] = {}  # digest -> whether to keep what comes
        self._closed = False
        self._threads = FetchThreads(fetches, "loraplex-fetch")
        self._placer = threading.Thread(target=self._place_loop, name="loraplex-loader", daemon=True)
        self._placer.start()

    # -- for the step loop ------------------------------------------------------------------------------------

    def acquire(self, digests: Sequence[str], versions: Sequence[str]) -> Ticket:
        """Claim adapters; the ticket is ready at once when all are on the device, else as soon as they are."""
        ticket = Ticket(tuple(digests), tuple(versions))
        with self._changed:
            if self._closed:
                ticket.error = Draining("the server is shutting down")
            elif self._leasable(ticket):
                self._lease_all(ticket)
            else:
                self._enqueue(ticket)
        return ticket

    def begin(self, ticket: Ticket) -> bool:
        """Keep a ready ticket's adapters on the device from now on; False when the ticket is ready no more."""
        with self._changed:
            if not ticket.ready:
                return False
            del self._ready[ticket]
            self._running.add(ticket)
            ticket.running = True
            return True

    def pause(self, ticket: Ticket) -> None:
        """Undo `begin`: the adapters may go if others need the rows; the ticket gets them back in its turn."""
        with self._changed:
            self._running.remove(ticket)
            self._ready[ticket] = None
            ticket.running = False
            if any(self._device[digest].yielding for digest in ticket.digests):
                self._recall(ticket)

    def passed_over(self) -> None:
        """A step was scheduled, and the tickets still ready were not begun: now they may lose their adapters.

        Not before: a ticket taken back while nobody could have begun it would go round for ever.
        """
        with self._changed:
            for ticket in list(self._ready):
                if ticket.passed_over and any(self._device[digest].yielding for digest in ticket.digests):
                    self._recall(ticket)
                ticket.passed_over = True

    def release(self, ticket: Ticket) -> None:
        """Give a ticket back, ready or not; idempotent."""
        with self._changed:
            ticket.cancelled = True
            queued = ticket in self._queue
            self._queue.pop(ticket, None)
            self._ready.pop(ticket, None)
            self._running.discard(ticket)
            ticket.ready = ticket.running = False
            self._return(ticket)
            if queued:
                self._evict_from_host()
                self._fetch_more()
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
            status = self._status(digest) if ticket.ready else None
            self.release(ticket)
            if status is None:
                assert ticket.error is not None
                raise ticket.error
            # As it is without the lease of this call, which nobody else sees.
            return self._status(digest) if digest in self._device else status

    def unload(self, digest: str) -> bool:
        """Free an adapter everywhere. False: requests still use it, it goes when the last of them ends.

        Raises `AdapterInUse` when it is pinned.
        """
        with self._changed:
            if digest in self._pinned:
                raise AdapterInUse("the adapter is pinned; unpin it first")
            self._host.pop(digest, None)
            if digest in self._fetching:
                self._fetching[digest] = False
            resident = self._device.get(digest)
            if resident is None:
                self._fetch_more()  # for those who wait for it all the same
                return True
            resident.draining = True
            if resident.leases:
                return False
            self._drop(digest)
            self._changed.notify_all()
            return True

    def pin(self, digest: str) -> None:
        """From now on, or from its next load on, the adapter leaves neither the device nor host memory by itself."""
        with self._changed:
            self._pinned.add(digest)
            resident = self._device.get(digest)
            if resident is not None:
                resident.yielding = False
            self._changed.notify_all()

    def unpin(self, digest: str) -> None:
        """Undo `pin`; harmless when the adapter is not pinned."""
        with self._changed:
            self._pinned.discard(digest)
            self._evict_from_host()
            self._changed.notify_all()

    def list(self) -> list[AdapterStatus]:
        """Every adapter that holds memory or is on its way."""
        with self._changed:
            loading = [
                AdapterStatus(digest, version, Tier.LOADING, 0, 0, 0, 0, False, (), digest in self._pinned)
                for ticket in self._queue
                for digest, version in zip(ticket.digests, ticket.versions, strict=True)
            ]
            known = {*self._device, *self._host}
            return [self._status(digest) for digest in known] + [
                status for status in {s.digest: s for s in loading}.values() if status.digest not in known
            ]

    def close(self) -> None:
        """End the threads; tickets still waiting fail. Does not wait for a hub that hangs."""
        with self._changed:
            self._closed = True
            for ticket in list(self._queue):
                self._settle(ticket, Draining("the server is shutting down"))
            self._changed.notify_all()
        self._threads.close()
        self._placer.join()

    def check_integrity(self) -> None:
        """Raise AssertionError unless rows, leases and queues add up."""
        with self._changed:
            owned = {digest: resident.rows for digest, resident in self._device.items()}
            if self._writing is not None:
                owned[f"writing {self._writing[0]}"] = self._writing[1]
            self._arena.check_integrity(owned)
            leased = Counter(d for t in (*self._ready, *self._running, *self._queue) for d in t.held)
            if leased != Counter({d: r.leases for d, r in self._device.items() if r.leases}):
                raise AssertionError("leases and tickets disagree")
            if any(ticket.held for ticket in self._queue if ticket is not self._placing):
                raise AssertionError("a ticket holds adapters out of its turn")
            for ticket in (*self._ready, *self._running):
                if not ticket.ready or ticket.cancelled or sorted(ticket.held) != sorted(ticket.digests):
                    raise AssertionError("a ready ticket lacks an adapter")
            if any(ticket.ready or ticket.cancelled for ticket in self._queue):
                raise AssertionError("a ticket is queued that does not wait")
            if self._host_bytes() > self._host_budget and any(self._evictable(digest) for digest in self._host):
                raise AssertionError("host memory is above its budget without need")

    @property
    def rows_total(self) -> int:
        """Rows of the arena."""
        return self._arena.rows

    def leases(self) -> int:
        """Leases given out and not yet returned."""
        with self._changed:
            return sum(resident.leases for resident in self._device.values())

    # -- the fetching threads -----------------------------------------------------------------------------------

    def _fetch_one(self, digest: str) -> None:
        with self._changed:
            if not self._wanted(digest):
                del self._fetching[digest]
                self._fetch_more()
                return
        started = time.monotonic()
        weights, error = None, None
        try:
            weights = self._parse(self._fetch(digest))
        except Exception as raised:
            error = raised
            if not isinstance(error, ServerError) and not hasattr(error, "reason"):
                log.exception("loading an adapter failed")
        with self._changed:
            keep = self._fetching.pop(digest)
            if weights is not None and (keep or self._wanted(digest)):
                self._host[digest] = weights
                self._evict_from_host()
            if error is not None:
                for ticket in [t for t in self._queue if digest in t.digests and digest not in t.held]:
                    self._settle(ticket, error)
            self._fetch_more()
            self._changed.notify_all()
        self._wake()  # outside the lock: who wakes may hold one that `acquire` is called under
        if weights is not None:
            self._loaded("host", time.monotonic() - started)

    def _fetch_more(self) -> None:
        """Start fetches in the tickets' order. Parsed adapters that wait for rows may fill the host's budget once;
        the first ticket need not care, so that there is always one that can be completed."""
        if self._closed:
            return
        full: bool | None = None
        for i, ticket in enumerate(self._queue):
            if len(self._fetching) >= 2 * self._fetches:
                return
            if i > 0 and full is None:
                full = self._waiting_bytes() >= self._host_budget
            if full:
                return
            for digest in ticket.digests:
                if digest not in self._device and digest not in self._host and digest not in self._fetching:
                    self._fetching[digest] = True
                    self._threads.run(partial(self._fetch_one, digest))

    # -- the placing thread -------------------------------------------------------------------------------------

    def _place_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._placeable() is not None)
                if self._closed:
                    return
                ticket = self._placing = self._placeable()
            assert ticket is not None
            error = None
            try:
                for digest, version in zip(ticket.digests, ticket.versions, strict=True):
                    if not self._bring(digest, version, ticket):
                        break
            except Exception as raised:
                error = raised
                if not isinstance(error, ServerError):
                    log.exception("placing an adapter failed")
            with self._changed:
                self._placing = None
                if error is not None and ticket in self._queue:
                    self._settle(ticket, error)
                elif ticket in self._queue and len(ticket.held) == len(ticket.digests):
                    self._settle(ticket, None)
                else:
                    self._return(ticket)  # cancelled, or unloaded under way: then it waits for another fetch
                self._serve_resident()
                self._fetch_more()
            self._wake()

    def _placeable(self) -> Ticket | None:
        """The first ticket all of whose adapters are parsed or on the device."""
        for ticket in self._queue:
            if all(digest in self._device or digest in self._host for digest in ticket.digests):
                return ticket
        return None

    def _bring(self, digest: str, version: str, ticket: Ticket) -> bool:
        """Put one adapter on the device and lease it to the ticket; False when that is not to be now."""
        with self._changed:
            if ticket not in self._queue:
                return False
            resident = self._device.get(digest)
            if resident is not None:
                # Should it have been about to make room for others: its turn came again before that happened.
                self._lease(digest, ticket)
                if resident.yielding:
                    resident.yielding = False
                    self._serve_resident()
                return True
            weights = self._host.get(digest)
        if weights is None:
            return False
        started = time.monotonic()
        rows = self._find_rows(weights, ticket)
        if rows is None:
            return False
        try:
            self._arena.write(rows, weights)
            parts = weights.parts.on(self._arena.device)
        except BaseException:
            with self._changed:
                self._writing = None
                self._arena.free(rows)
            raise
        with self._changed:
            self._writing = None
            self._device[digest] = _Resident(rows, weights.rank, version, weights.warnings, parts)
            self._evict_from_host()  # it may go from there now
            if ticket in self._queue:
                self._lease(digest, ticket)
        self._loaded("device", time.monotonic() - started)
        return True

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
            while ticket in self._queue:
                held = sum(resident.parts.bytes for resident in self._device.values())
                fits = held + weights.parts.bytes <= self._parts_budget
                rows = self._arena.allocate(weights.rank) if fits else None
                if rows is not None:
                    self._writing = (weights.digest, rows)
                    return rows
                idle = next(
                    (
                        digest
                        for digest, resident in self._device.items()
                        if not resident.leases and digest not in self._pinned and (fits or resident.parts.bytes)
                    ),
                    None,
                )
                if idle is not None:
                    self._drop(idle)
                    continue
                if self._closed:
                    raise Draining("the server is shutting down")
                if not self._yield_one(ticket):
                    raise RequestTooLarge("the request's adapters together need more rows than the server can free")
                self._changed.wait()
        return None

    def _yield_one(self, ticket: Ticket) -> bool:
        """See to it that an adapter gives its rows up some time; False when none can."""
        for digest, resident in self._device.items():
            if resident.yielding and digest not in ticket.held:
                return True
        for digest, resident in self._device.items():
            if digest not in ticket.held and digest not in self._pinned:
                resident.yielding = True
                return True
        return False

    # -- under the lock -----------------------------------------------------------------------------------------

    def _enqueue(self, ticket: Ticket) -> None:
        self._queue[ticket] = None
        self._fetch_more()
        self._changed.notify_all()

    def _recall(self, ticket: Ticket) -> None:
        """Take a ready ticket's leases back; it queues again, behind the others."""
        del self._ready[ticket]
        ticket.ready = False
        self._return(ticket)
        self._enqueue(ticket)

    def _settle(self, ticket: Ticket, error: Exception | None) -> None:
        del self._queue[ticket]
        ticket.error = error
        if error is None:
            self._set_ready(ticket)
        else:
            self._return(ticket)
        self._evict_from_host()
        self._changed.notify_all()

    def _serve_resident(self) -> None:
        """Complete the tickets whose adapters others have brought meanwhile."""
        for ticket in [t for t in self._queue if t is not self._placing and self._leasable(t)]:
            del self._queue[ticket]
            self._lease_all(ticket)
            self._changed.notify_all()

    def _leasable(self, ticket: Ticket) -> bool:
        return all(d in self._device and not self._device[d].yielding for d in ticket.digests)

    def _lease_all(self, ticket: Ticket) -> None:
        for digest in ticket.digests:
            self._lease(digest, ticket)
        self._set_ready(ticket)

    def _set_ready(self, ticket: Ticket) -> None:
        ticket.ready, ticket.passed_over = True, False
        self._ready[ticket] = None

    def _lease(self, digest: str, ticket: Ticket) -> None:
        resident = self._device[digest]
        resident.leases += 1
        resident.draining = False  # somebody names it again
        self._device.move_to_end(digest)
        ticket.held.append(digest)
        for warning in resident.warnings:
            line = f"{resident.version}: {warning}"
            if line not in ticket.warnings:  # a recalled ticket leases twice
                ticket.warnings.append(line)

    def _return(self, ticket: Ticket) -> None:
        held, ticket.held = ticket.held, []
        for digest in held:
            resident = self._device[digest]
            resident.leases -= 1
            if resident.draining and not resident.leases:
                self._drop(digest)
        if held:
            self._changed.notify_all()

    def _drop(self, digest: str) -> None:
        self._arena.free(self._device.pop(digest).rows)
        self._evict_from_host()
        self._fetch_more()

    def _wanted(self, digest: str) -> bool:
        """Whether a ticket waits for the adapter to come to the device."""
        return digest not in self._device and any(digest in ticket.digests for ticket in self._queue)

    def _evictable(self, digest: str) -> bool:
        return not self._wanted(digest) and digest not in self._pinned

    def _host_bytes(self) -> int:
        return sum(weights.bytes for weights in self._host.values())

    def _waiting_bytes(self) -> int:
        wanted = {digest for ticket in self._queue for digest in ticket.digests if digest not in self._device}
        return sum(weights.bytes for digest, weights in self._host.items() if digest in wanted)

    def _evict_from_host(self) -> None:
        """Keep host memory within its budget, least recently parsed first, never what waits to be placed."""
        held = self._host_bytes()
        for digest in list(self._host):
            if held <= self._host_budget:
                return
            if self._evictable(digest):
                held -= self._host.pop(digest).bytes

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
            pinned=digest in self._pinned,
        )
