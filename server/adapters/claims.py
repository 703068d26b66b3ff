"""The tickets, and the one lock around everything that says which adapters are where.

Rows are leased to tickets. When all rows are leased and a ticket waits for some, the adapter longest not asked for
*yields*: tickets of requests that do not run yet, and had their chance to, give their leases back and queue again, new
ones queue, and the rows are free when the running requests end. Without that, a popular adapter would keep its rows
for ever.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

from server.adapters.device_cache import DeviceCache
from server.adapters.host_cache import HostCache
from server.adapters.tickets import Ticket


class Claims:
    """Tickets by state, over the adapters in host memory and on the device.

    Whoever calls a method or looks at a field, `host` and `device` included, holds `changed`; only the loaders and
    `Residency` do. `fetch_more` is called, under the lock, whenever more adapters might be worth fetching.
    """

    def __init__(self, host: HostCache, device: DeviceCache, fetch_more: Callable[[], None]) -> None:
        self.changed = threading.Condition()
        self.host = host
        self.device = device
        self.queue: dict[Ticket, None] = {}  # tickets not ready, in order of arrival
        self.ready: dict[Ticket, None] = {}  # tickets with all their leases that do not run
        self.running: set[Ticket] = set()
        self.placing: Ticket | None = None  # of queue: the only one that may hold leases
        self.closed = False
        self._fetch_more = fetch_more

    def add(self, ticket: Ticket) -> None:
        """Make a new ticket ready if everything it needs is there, else queue it."""
        if self._leasable(ticket):
            self._lease_all(ticket)
        else:
            self._enqueue(ticket)

    def begin(self, ticket: Ticket) -> bool:
        """From ready to running; False when it is ready no more."""
        if not ticket.ready:
            return False
        del self.ready[ticket]
        self.running.add(ticket)
        ticket.running = True
        return True

    def pause(self, ticket: Ticket) -> None:
        """From running to ready, or to the queue when one of its adapters is to make room."""
        self.running.remove(ticket)
        self.ready[ticket] = None
        ticket.running = False
        if self._yields(ticket):
            self._recall(ticket)

    def pass_over(self) -> None:
        """Tickets ready now were not begun. From the second time on they may lose their adapters."""
        for ticket in list(self.ready):
            if ticket.passed_over and self._yields(ticket):
                self._recall(ticket)
            ticket.passed_over = True

    def remove(self, ticket: Ticket) -> None:
        """Forget a ticket in whatever state; idempotent."""
        ticket.cancelled = True
        queued = ticket in self.queue
        self.queue.pop(ticket, None)
        self.ready.pop(ticket, None)
        self.running.discard(ticket)
        ticket.ready = ticket.running = False
        self.give_back(ticket)
        if queued:
            self.evict_from_host()
            self._fetch_more()
            self.changed.notify_all()

    def settle(self, ticket: Ticket, error: Exception | None) -> None:
        """Take a ticket out of the queue: it holds all its leases now, or it failed."""
        del self.queue[ticket]
        ticket.error = error
        if error is None:
            self._set_ready(ticket)
        else:
            self.give_back(ticket)
        self.evict_from_host()
        self.changed.notify_all()

    def serve_resident(self) -> None:
        """Complete the tickets whose adapters others have brought meanwhile."""
        for ticket in [t for t in self.queue if t is not self.placing and self._leasable(t)]:
            del self.queue[ticket]
            self._lease_all(ticket)
            self.changed.notify_all()

    def lease(self, digest: str, ticket: Ticket) -> None:
        """Lease a resident adapter to a ticket."""
        resident = self.device.lease(digest)
        ticket.held.append(digest)
        if not resident.reaches_kv:
            ticket.beside_kv.add(digest)
        for warning in resident.warnings:
            line = f"{resident.version}: {warning}"
            if line not in ticket.warnings:  # a recalled ticket leases twice
                ticket.warnings.append(line)

    def give_back(self, ticket: Ticket) -> None:
        """Return all of a ticket's leases."""
        held, ticket.held = ticket.held, []
        for digest in held:
            if self.device.give_back(digest):
                self.dropped()
        if held:
            self.changed.notify_all()

    def dropped(self) -> None:
        """Adapters left the device: who waits for them needs them fetched again."""
        self.evict_from_host()
        self._fetch_more()

    def wanted(self, digest: str) -> bool:
        """Whether a ticket waits for the adapter to come to the device."""
        return digest not in self.device and any(digest in ticket.digests for ticket in self.queue)

    def evict_from_host(self) -> None:
        """Keep host memory within its budget, but never let go of what waits to be placed."""
        self.host.evict(self._evictable)

    def check_integrity(self) -> None:
        """Raise AssertionError unless rows, leases and queues add up."""
        self.device.check_integrity(Counter(d for t in (*self.ready, *self.running, *self.queue) for d in t.held))
        if any(ticket.held for ticket in self.queue if ticket is not self.placing):
            raise AssertionError("a ticket holds adapters out of its turn")
        for ticket in (*self.ready, *self.running):
            if not ticket.ready or ticket.cancelled or sorted(ticket.held) != sorted(ticket.digests):
                raise AssertionError("a ready ticket lacks an adapter")
        if any(ticket.ready or ticket.cancelled for ticket in self.queue):
            raise AssertionError("a ticket is queued that does not wait")
        self.host.check_integrity(self._evictable)

    def _enqueue(self, ticket: Ticket) -> None:
        self.queue[ticket] = None
        self._fetch_more()
        self.changed.notify_all()

    def _recall(self, ticket: Ticket) -> None:
        """Take a ready ticket's leases back; it queues again, behind the others."""
        del self.ready[ticket]
        ticket.ready = False
        self.give_back(ticket)
        self._enqueue(ticket)

    def _yields(self, ticket: Ticket) -> bool:
        return any(self.device[digest].yielding for digest in ticket.digests)

    def _leasable(self, ticket: Ticket) -> bool:
        return all(self.device.leasable(digest) for digest in ticket.digests)

    def _lease_all(self, ticket: Ticket) -> None:
        for digest in ticket.digests:
            self.lease(digest, ticket)
        self._set_ready(ticket)

    def _set_ready(self, ticket: Ticket) -> None:
        ticket.ready, ticket.passed_over = True, False
        self.ready[ticket] = None

    def _evictable(self, digest: str) -> bool:
        return not self.wanted(digest) and digest not in self.device.pinned
