"""Adapters on the device: their arena rows and parts, who may be evicted, who is asked to make room.

An adapter without leases may be evicted, least recently leased first; one with leases or a pin never. No lock of its
own: `Claims` says who calls.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from server.adapters.arena import Arena, Rows, blocks
from server.adapters.parts import AdapterParts
from server.adapters.weights import LoraWeights
from server.errors import RequestTooLarge


@dataclass
class Resident:
    """One adapter on the device."""

    rows: Rows
    rank: int
    version: str
    warnings: tuple[str, ...]
    parts: AdapterParts
    reaches_kv: bool = True
    leases: int = 0
    draining: bool = False  # unloaded while in use: goes with its last lease
    yielding: bool = False  # gives no new leases until its rows were given to another


class DeviceCache(Mapping[str, Resident]):
    """Residents by digest, least recently leased first, over the rows of `arena` and `parts_budget` bytes of parts."""

    def __init__(self, arena: Arena, parts_budget: int) -> None:
        self.arena = arena
        self.pinned: set[str] = set()
        self._parts_budget = parts_budget
        self._residents: OrderedDict[str, Resident] = OrderedDict()
        self._writing: tuple[str, Rows] | None = None  # allocated, being copied into, not yet a resident's

    def __getitem__(self, digest: str) -> Resident:
        return self._residents[digest]

    def __iter__(self) -> Iterator[str]:
        return iter(self._residents)

    def __len__(self) -> int:
        return len(self._residents)

    # -- coming and going -----------------------------------------------------------------------------------------

    def refuse_oversized(self, wanted: Mapping[str, Resident | LoraWeights]) -> None:
        """Raise `RequestTooLarge` for adapters, by digest, that would not fit even if they and the pinned ones were
        alone."""
        who = "the request's adapters together need" if len(wanted) > 1 else "the adapter needs"
        pinned = {d: r for d, r in self._residents.items() if d in self.pinned and d not in wanted}
        for unit, option, total, need in (
            ("rows", "--adapter-memory", self.arena.rows, lambda adapter: blocks(adapter.rank)),
            ("bytes beside LoRA rows", "--adapter-parts-memory", self._parts_budget, lambda a: a.parts.bytes),
        ):
            needed, taken = sum(map(need, wanted.values())), sum(map(need, pinned.values()))
            if needed > total - taken:
                but = f", {taken} of them for pinned adapters" if taken else ""
                raise RequestTooLarge(f"{who} {needed} {unit}, the server has {total}{but} ({option})")

    def allocate(self, weights: LoraWeights) -> Rows | None:
        """Rows for an adapter, evicting what nobody leases; None when that is not enough.

        The rows are the caller's to write, until `put` or `abandon`. One adapter is written at a time.
        """
        while True:
            held = sum(resident.parts.bytes for resident in self._residents.values())
            fits = held + weights.parts.bytes <= self._parts_budget
            rows = self.arena.allocate(weights.rank) if fits else None
            if rows is not None:
                self._writing = (weights.digest, rows)
                return rows
            idle = next((d for d, r in self._residents.items() if self._evictable(d) and (fits or r.parts.bytes)), None)
            if idle is None:
                return None
            self.drop(idle)

    def put(self, weights: LoraWeights, version: str, rows: Rows, parts: AdapterParts) -> None:
        """The rows were written: from now on the adapter is resident. `parts`: in the device's memory."""
        self._writing = None
        self._residents[weights.digest] = Resident(
            rows, weights.rank, version, weights.warnings, parts, weights.reaches_kv
        )

    def abandon(self, rows: Rows) -> None:
        """Writing the rows failed."""
        self._writing = None
        self.arena.free(rows)

    def drop(self, digest: str) -> None:
        """Free an adapter's rows and let go of its parts."""
        self.arena.free(self._residents.pop(digest).rows)

    # -- leases ---------------------------------------------------------------------------------------------------

    def leasable(self, digest: str) -> bool:
        """Whether the adapter is here and is not to make room."""
        return digest in self._residents and not self._residents[digest].yielding

    def lease(self, digest: str) -> Resident:
        """Keep a resident adapter from being evicted."""
        resident = self._residents[digest]
        resident.leases += 1
        resident.draining = False  # somebody names it again
        self._residents.move_to_end(digest)
        return resident

    def give_back(self, digest: str) -> bool:
        """Undo one `lease`; True when the adapter was unloaded meanwhile and went with it."""
        resident = self._residents[digest]
        resident.leases -= 1
        gone = resident.draining and not resident.leases
        if gone:
            self.drop(digest)
        return gone

    def ask_to_yield(self, but: Collection[str]) -> bool:
        """See to it that an adapter outside `but` gives its rows up some time; False when none can."""
        if any(resident.yielding and digest not in but for digest, resident in self._residents.items()):
            return True
        for digest, resident in self._residents.items():
            if digest not in but and digest not in self.pinned:
                resident.yielding = True
                return True
        return False

    def clear(self, digests: Collection[str]) -> bool:
        """Drop those of these adapters that nobody leases, and ask the others to yield; whether there are such."""
        left = False
        for digest in digests:
            if digest in self._residents and self._evictable(digest):
                self.drop(digest)
            elif digest in self._residents and digest not in self.pinned:
                left = self._residents[digest].yielding = True
        return left

    def check_integrity(self, leased: Counter[str]) -> None:
        """Raise AssertionError unless rows add up and the leases are those that tickets hold."""
        owned = {digest: resident.rows for digest, resident in self._residents.items()}
        if self._writing is not None:
            owned[f"writing {self._writing[0]}"] = self._writing[1]
        self.arena.check_integrity(owned)
        if leased != Counter({digest: r.leases for digest, r in self._residents.items() if r.leases}):
            raise AssertionError("leases and tickets disagree")

    def _evictable(self, digest: str) -> bool:
        return not self._residents[digest].leases and digest not in self.pinned
