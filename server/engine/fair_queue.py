"""Whose turn it is: token-weighted fair queueing over tenants, and within a tenant over its adapters.

Every tenant, and every adapter (or combination) of a tenant, has a count of the tokens it was served. Who has least
is next. Who comes back after a pause starts from where the least served active one stands, so that nobody saves up
idle time; who was served more than the others keeps that debt while it lasts. A line that is passed over for long
gains on the others (`AGEING` tokens a step), so that an endless row of newcomers cannot starve it. The age is that of
the line, not of its oldest request: a flood waits long because of itself and shall gain nothing by it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from server.engine.sequence import Sequence

AGEING = 16  # tokens of service that one step of waiting without any is worth
LATELY = 256  # steps
BURST = 256  # tokens that a line may be ahead of the least served one and still not wait for a crowd's step


@dataclass(eq=False)
class Line:
    """What one claimant was served; `active` counts its requests inside, waiting or running."""

    served: float = 0.0  # tokens
    served_at: int = 0  # the step
    waiting: int = 0
    running: int = 0

    @property
    def active(self) -> bool:
        """Whether it has a request inside."""
        return bool(self.waiting or self.running)

    @property
    def crowds(self) -> bool:
        """Whether requests of it wait although several run."""
        return bool(self.waiting and self.running > 1)

    def standing(self, step: int) -> float:
        """Small is next; only lines of one level compare."""
        return self.served - AGEING * (step - self.served_at)


@dataclass(eq=False)
class Flow(Line):
    """One tenant's requests with the same adapters, first come first served."""

    queue: deque[Sequence] = field(default_factory=deque)

    @property
    def ready(self) -> bool:
        """Whether its first request could run now."""
        return bool(self.queue) and self.queue[0].ticket.ready


@dataclass(eq=False)
class Tenant(Line):
    """One tenant's flows."""

    flows: dict[tuple[str, ...], Flow] = field(default_factory=dict)


class FairQueue:
    """The waiting sequences, and what every line that waits or runs was served. Iterates over the waiting ones."""

    def __init__(self) -> None:
        self.tenants: dict[str, Tenant] = {}
        self._step = 0
        self._order = itertools.count(1)
        self._length = 0
        # The line that began last and the last one that was another, each with the step.
        self._newest: tuple[object, int] = (None, -LATELY)
        self._other: tuple[object, int] = (None, -LATELY)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        for tenant in self.tenants.values():
            for flow in tenant.flows.values():
                yield from flow.queue

    def waiting_of(self) -> dict[str, int]:
        """How many requests of each tenant wait."""
        return {name: tenant.waiting for name, tenant in self.tenants.items() if tenant.waiting}

    def tick(self) -> None:
        """A step begins."""
        self._step += 1

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence behind those of its flow."""
        sequence.order = next(self._order)
        tenant = self.tenants.setdefault(sequence.request.tenant, Tenant())
        self._enter(tenant, self.tenants.values())
        flow = tenant.flows.setdefault(sequence.flow, Flow())
        self._enter(flow, tenant.flows.values())
        self._wait(tenant, flow)
        flow.queue.append(sequence)

    def start(self, sequence: Sequence) -> None:
        """A waiting sequence begins to run."""
        tenant, flow = self.lines(sequence)
        self._unwait(tenant, flow, sequence)
        tenant.running += 1
        flow.running += 1
        line = (sequence.request.tenant, sequence.flow)
        if line != self._newest[0]:
            self._other = self._newest
        self._newest = (line, self._step)

    @property
    def several_of_late(self) -> bool:
        """Whether requests of more than one line have begun in the last `LATELY` steps."""
        return self._step - self._other[1] < LATELY

    def put_back(self, sequence: Sequence) -> None:
        """A running sequence waits again, before the others of its flow."""
        tenant, flow = self.lines(sequence)
        tenant.running -= 1
        flow.running -= 1
        self._wait(tenant, flow)
        # Several may come back in one step, the youngest first: the oldest belongs in front of all.
        at = next((i for i, other in enumerate(flow.queue) if other.order > sequence.order), len(flow.queue))
        flow.queue.insert(at, sequence)

    def leave(self, sequence: Sequence, *, running: bool) -> None:
        """A sequence ends, while it ran or waited."""
        tenant, flow = self.lines(sequence)
        if running:
            tenant.running -= 1
            flow.running -= 1
        else:
            self._unwait(tenant, flow, sequence)
        if not flow.active:
            _forget(tenant.flows)
        if not tenant.active:
            _forget(self.tenants)

    def charge(self, sequence: Sequence, tokens: int) -> None:
        """`tokens` were, or are certain to be, computed for this sequence."""
        for line in self.lines(sequence):
            line.served += tokens
            line.served_at = self._step

    def next(self) -> Sequence | None:
        """The waiting sequence whose turn it is, among those whose adapters are on the device."""
        ready = [(tenant, flow) for tenant in self.tenants.values() for flow in tenant.flows.values() if flow.ready]
        if not ready:
            return None
        _, flow = min(ready, key=lambda lines: self.standing(lines[1].queue[0]))
        return flow.queue[0]

    def newcomers(self) -> list[Sequence]:
        """The first sequences of lines that run nothing while another of their level crowds, the least served first;
        their adapters are on the device, and they are at most `BURST` tokens ahead of who was served least."""
        among = self._ahead_of(self.tenants.values())
        found: list[Sequence] = []
        for tenant in self.tenants.values():
            allowed = self._ahead_of(tenant.flows.values()) if tenant.running else among
            if allowed is None:
                continue
            for flow in tenant.flows.values():
                line = flow if tenant.running else tenant
                if flow.ready and not line.running and line.standing(self._step) <= allowed:
                    found.append(flow.queue[0])
        return sorted(found, key=self.standing)

    def _ahead_of(self, level: Iterable[Line]) -> float | None:
        """The standing that newcomers beside these lines may have; None where none of them crowds."""
        active = [line for line in level if line.active]
        if not any(line.crowds for line in active):
            return None
        return min(line.standing(self._step) for line in active) + BURST

    def standing(self, sequence: Sequence) -> tuple[float, float, int]:
        """Small is next: the tenant's standing, then the flow's, then the order of arrival."""
        tenant, flow = self.lines(sequence)
        return tenant.standing(self._step), flow.standing(self._step), sequence.order

    def lines(self, sequence: Sequence) -> tuple[Tenant, Flow]:
        """Where a sequence inside belongs."""
        tenant = self.tenants[sequence.request.tenant]
        return tenant, tenant.flows[sequence.flow]

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Raise AssertionError unless every count is what it counts."""
        lines = [self.lines(sequence) for sequence in running]
        for tenant in self.tenants.values():
            for flow in tenant.flows.values():
                if flow.waiting != len(flow.queue) or flow.running != sum(own is flow for _, own in lines):
                    raise AssertionError("a flow has lost count of its requests")
            if (tenant.waiting, tenant.running) != (
                sum(flow.waiting for flow in tenant.flows.values()),
                sum(flow.running for flow in tenant.flows.values()),
            ):
                raise AssertionError("a tenant has lost count of its requests")
        if self._length != sum(tenant.waiting for tenant in self.tenants.values()):
            raise AssertionError("the queue has lost count of its requests")

    def _enter(self, line: Line, level: Iterable[Line]) -> None:
        """Give a line that was idle its place: a token before the least served active one.

        Behind or beside that one, it would wait for it to be served once more, which takes a step.
        """
        if not line.active:
            least = min((other.standing(self._step) for other in level if other.active), default=1.0)
            line.served = max(line.served, least - 1.0)
            line.served_at = self._step

    def _wait(self, tenant: Tenant, flow: Flow) -> None:
        tenant.waiting += 1
        flow.waiting += 1
        self._length += 1

    def _unwait(self, tenant: Tenant, flow: Flow, sequence: Sequence) -> None:
        flow.queue.remove(sequence)
        tenant.waiting -= 1
        flow.waiting -= 1
        self._length -= 1


def _forget(lines: dict[str, Tenant] | dict[tuple[str, ...], Flow]) -> None:
    """Drop the idle lines that owe nothing; all of them when no line is active."""
    least = min((line.served for line in lines.values() if line.active), default=float("inf"))
    for key in [key for key, line in lines.items() if not line.active and line.served <= least]:
        del lines[key]  # type: ignore[arg-type]
