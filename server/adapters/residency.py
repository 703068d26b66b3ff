"""Which adapters are where: hub -> host memory -> arena rows, with leases for requests in flight.

Threads do everything slow, so the step loop never waits: it asks for a `Ticket`, goes on, and finds the ticket ready
at a later step. This is the face of it; the work is done by

    claims.py          the tickets' states and leases, and the lock around all of it
    host_loader.py     hub -> host memory, in several threads        host_cache.py     what is there, within a budget
    device_loader.py   host memory -> rows, in one thread            device_cache.py   what is there, eviction
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from server.adapters.arena import Arena, blocks
from server.adapters.claims import Claims
from server.adapters.device_cache import DeviceCache
from server.adapters.device_loader import DeviceLoader
from server.adapters.host_cache import HostCache
from server.adapters.host_loader import HostLoader
from server.adapters.load_pace import LoadPace
from server.adapters.parts import AdapterParts
from server.adapters.tickets import AdapterStatus, Ticket, Tier
from server.adapters.weights import AdapterFetch, AdapterFiles, LoraWeights
from server.errors import AdapterInUse, Cancelled, Draining, InvalidRequest

__all__ = ["AdapterStatus", "Residency", "Ticket", "Tier"]


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
        pace: LoadPace | None = None,
    ) -> None:
        self._arena = arena
        self._host = HostCache(host_bytes)
        self._device = DeviceCache(arena, parts_bytes)
        self._claims = Claims(self._host, self._device, fetch_more=lambda: self._host_loader.fetch_more())
        self._changed = self._claims.changed
        pace = pace or LoadPace()
        self._host_loader = HostLoader(self._claims, fetch, parse, fetches, wake, loaded, pace)
        self._device_loader = DeviceLoader(self._claims, self._host_loader.fetch_more, wake, loaded, pace)

    # -- for the step loop ------------------------------------------------------------------------------------

    def acquire(self, digests: Sequence[str], versions: Sequence[str]) -> Ticket:
        """Claim adapters; the ticket is ready at once when all are on the device, else as soon as they are."""
        ticket = Ticket(tuple(digests), tuple(versions))
        with self._changed:
            if self._claims.closed:
                ticket.error = Draining("the server is shutting down")
            else:
                self._claims.add(ticket)
        return ticket

    def begin(self, ticket: Ticket) -> bool:
        """Keep a ready ticket's adapters on the device from now on; False when the ticket is ready no more."""
        with self._changed:
            return self._claims.begin(ticket)

    def pause(self, ticket: Ticket) -> None:
        """Undo `begin`: the adapters may go if others need the rows; the ticket gets them back in its turn."""
        with self._changed:
            self._claims.pause(ticket)

    def passed_over(self) -> None:
        """A step was scheduled, and the tickets still ready were not begun: now they may lose their adapters.

        Not before: a ticket taken back while nobody could have begun it would go round for ever.
        """
        with self._changed:
            self._claims.pass_over()

    def release(self, ticket: Ticket) -> None:
        """Give a ticket back, ready or not; idempotent."""
        with self._changed:
            self._claims.remove(ticket)

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
        return self.arrived(self.acquire((digest,), (version,)))

    def arrived(self, ticket: Ticket) -> AdapterStatus:
        """Wait for a ticket's only adapter, at most until another thread releases the ticket, and give it back.

        Raises what made it impossible, and `Cancelled` for a released ticket.
        """
        [digest] = ticket.digests
        with self._changed:
            self._changed.wait_for(lambda: ticket.ready or ticket.error is not None or ticket.cancelled)
            status = self._status(digest) if ticket.ready else None
            self._claims.remove(ticket)
            if status is None:
                raise ticket.error or Cancelled("nobody waits for the adapter any more")
            # As it is without the lease of this call, which nobody else sees.
            return self._status(digest) if digest in self._device else status

    def unload(self, digest: str) -> bool:
        """Free an adapter everywhere. False: requests still use it, it goes when the last of them ends.

        Raises `AdapterInUse` when it is pinned.
        """
        with self._changed:
            if digest in self._device.pinned:
                raise AdapterInUse("the adapter is pinned; unpin it first")
            self._host.drop(digest)
            self._host_loader.forget(digest)
            resident = self._device.get(digest)
            if resident is None:
                self._host_loader.fetch_more()  # for those who wait for it all the same
                return True
            resident.draining = True
            if resident.leases:
                return False
            self._device.drop(digest)
            self._claims.dropped()
            self._changed.notify_all()
            return True

    def pin(self, digest: str) -> None:
        """From now on, or from its next load on, the adapter leaves neither the device nor host memory by itself."""
        with self._changed:
            self._device.pinned.add(digest)
            resident = self._device.get(digest)
            if resident is not None:
                resident.yielding = False
            self._changed.notify_all()

    def unpin(self, digest: str) -> None:
        """Undo `pin`; harmless when the adapter is not pinned."""
        with self._changed:
            self._device.pinned.discard(digest)
            self._claims.evict_from_host()
            self._changed.notify_all()

    def list(self) -> list[AdapterStatus]:
        """Every adapter that holds memory or is on its way."""
        with self._changed:
            loading = [
                AdapterStatus(digest, version, Tier.LOADING, 0, 0, 0, 0, False, (), digest in self._device.pinned)
                for ticket in self._claims.queue
                for digest, version in zip(ticket.digests, ticket.versions, strict=True)
            ]
            known = {*self._device, *self._host}
            return [self._status(digest) for digest in known] + [
                status for status in {s.digest: s for s in loading}.values() if status.digest not in known
            ]

    def close(self) -> None:
        """End the threads; tickets still waiting fail. Does not wait for a hub that hangs."""
        with self._changed:
            self._claims.closed = True
            for ticket in list(self._claims.queue):
                self._claims.settle(ticket, Draining("the server is shutting down"))
            self._changed.notify_all()
        self._host_loader.close()
        self._device_loader.join()

    def check_integrity(self) -> None:
        """Raise AssertionError unless rows, leases and queues add up."""
        with self._changed:
            self._claims.check_integrity()

    @property
    def rows_total(self) -> int:
        """Rows of the arena."""
        return self._arena.rows

    def leases(self) -> int:
        """Leases given out and not yet returned."""
        with self._changed:
            return sum(resident.leases for resident in self._device.values())

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
            pinned=digest in self._device.pinned,
        )
