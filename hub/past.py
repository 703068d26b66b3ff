"""What a hub's events tell of the past, for a hub here and one behind a server alike."""

from __future__ import annotations

from typing import Protocol

from hub.versions import Event


class Telling(Protocol):
    """A hub, or the catalog of one."""

    def events(self, since_seq: int, limit: int, full_name: str | None, /) -> list[Event]:
        """Up to `limit` events after `since_seq`, in order; of one adapter or of all."""
        ...


def all_events(hub: Telling, since: int = 0, full_name: str | None = None) -> list[Event]:
    """Every event after number `since`, oldest first; of one adapter or (None) of all."""
    events: list[Event] = []
    while batch := hub.events(since, 1000, full_name):
        events += batch
        since = batch[-1].seq
    return events


def removals(hub: Telling) -> list[Event]:
    """The removals of the versions that are removed and can be restored, by name and number."""
    removed: dict[tuple[str, int], Event] = {}
    for event in all_events(hub):
        version = (event.full_name, event.version)
        if event.kind == "rm":
            removed[version] = event
        elif event.kind in ("restore", "purge"):
            removed.pop(version, None)
    return [removed[version] for version in sorted(removed)]
