"""What a hub holds after a run of events: a pure function, the journal's meaning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hub.refs import Digest
from hub.versions import Event, Held

Key = tuple[str, int]  # full name, number


@dataclass
class State:
    """A hub's catalog without the manifests."""

    versions: dict[Key, Digest] = field(default_factory=dict)  # removed ones too, purged ones not
    removed: dict[Key, str] = field(default_factory=dict)  # since when
    purged: dict[Key, tuple[Digest, str]] = field(default_factory=dict)  # and when
    aliases: dict[tuple[str, str], tuple[Held, int]] = field(default_factory=dict)  # what it holds, its generation
    pins: set[tuple[str, int, str]] = field(default_factory=set)  # full name, number, holder
    signatures: set[tuple[str, int, Digest]] = field(default_factory=set)  # full name, number, the signature's digest
    next_number: dict[str, int] = field(default_factory=dict)
    last_seq: int = 0


def replay(events: Iterable[Event]) -> State:
    """The state after `events`, which begin with the first."""
    state = State()
    for event in events:
        _apply(state, event)
        state.last_seq = event.seq
    return state


def _apply(state: State, event: Event) -> None:
    key = (event.full_name, event.version)
    match event.kind:
        case "push":
            state.versions[key] = event.digest
            # Imported versions keep their numbers, which may come in any order.
            state.next_number[event.full_name] = max(state.next_number.get(event.full_name, 1), event.version + 1)
        case "tag":
            assert event.alias is not None
            state.aliases[event.full_name, event.alias] = (event.after or ((event.version, 1),), event.seq)
        case "untag":
            assert event.alias is not None
            state.aliases.pop((event.full_name, event.alias), None)
        case "rm":
            state.removed[key] = event.time
        case "restore":
            state.removed.pop(key, None)
        case "purge":
            state.purged[key] = (event.digest, event.time)
            state.versions.pop(key, None)
            state.removed.pop(key, None)
            state.pins = {pin for pin in state.pins if pin[:2] != key}
            state.signatures = {found for found in state.signatures if found[:2] != key}
        case "sign":
            state.signatures.add((*key, Digest(event.note or "")))
        case "pin":
            state.pins.add((*key, event.note or ""))
        case "unpin":
            state.pins.discard((*key, event.note or ""))
