"""What a request holds while it waits for its adapters and uses them, and what an administrator sees of them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


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
    beside_kv: set[str] = field(default_factory=set)  # of those leased so far: who changes no key and no value
