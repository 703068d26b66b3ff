"""From an adapter's name to the digest that answers, and from a digest to its files.

A request resolves its names once, at admission. Immutable names (`@3`, `@sha256:…`) are remembered for good; aliases
are remembered until the hub's event feed says that something happened to their adapter, so a moved alias is seen
within one poll interval and naming a known adapter costs no query. While the hub is unreachable, what is remembered
keeps working.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hub.errors import AdapterNotFound, HubError
from hub.kinds import check_adapter
from hub.refs import AdapterRef, Alias

if TYPE_CHECKING:
    from hub.facade import HubFacade
    from server.adapters.weights import AdapterFetch

log = logging.getLogger(__name__)

# Events that only move aliases; anything else (a removal, a kind this server does not know) forgets pinned names too.
_MOVING = frozenset({"push", "tag", "untag"})


class HubVersion(Protocol):
    """What the directory reads of a hub's version."""

    @property
    def digest(self) -> str:
        """The manifest's digest."""

    @property
    def text(self) -> str:
        """Full name and number: "team/x@3"."""


class HubEvent(Protocol):
    """What the directory reads of a hub's event."""

    @property
    def seq(self) -> int:
        """Its place in the feed."""

    @property
    def kind(self) -> str:
        """ "push", "tag", "untag", …"""

    @property
    def full_name(self) -> str:
        """The adapter it is about."""


class HubReader(Protocol):
    """The part of `hub.hub.Hub` the directory uses; its methods raise `HubError`s."""

    def resolve(self, ref: AdapterRef) -> HubVersion:
        """The version that `ref` means now."""

    def last_seq(self) -> int:
        """Sequence number of the newest event."""

    def watch(self, since_seq: int, stop: threading.Event, poll_seconds: float) -> Iterator[HubEvent]:
        """Events after `since_seq` as they come, until `stop` is set."""


@dataclass(frozen=True)
class ResolvedAdapter:
    """The version a name stood for at one moment."""

    version: str  # "team/x@3"
    digest: str


class AdapterDirectory:
    """Names → versions, with one thread following the hub's events. Safe to use from any thread.

    Raises `HubUnavailable` at construction when the hub cannot be read. Call `close` to end the thread.
    """

    def __init__(self, hub: HubReader, *, poll_seconds: float = 0.2, max_names: int = 65_536) -> None:
        self._hub = hub
        self._poll_seconds = poll_seconds
        self._max_names = max_names
        self._lock = threading.Lock()
        self._known: OrderedDict[AdapterRef, ResolvedAdapter] = OrderedDict()  # least recently used first
        self._refs_of: dict[str, set[AdapterRef]] = {}
        self._moves = 0  # events seen; a hub answer read before an event and stored after it would be stale for good
        self._stop = threading.Event()
        self._seq = hub.last_seq()
        self._thread = threading.Thread(target=self._follow, name="loraplex-directory", daemon=True)
        self._thread.start()

    def cached(self, ref: AdapterRef) -> ResolvedAdapter | None:
        """The version `ref` stands for if that is known without asking the hub; never blocks."""
        with self._lock:
            found = self._known.get(ref)
            if found is not None:
                self._known.move_to_end(ref)
            return found

    def resolve(self, ref: AdapterRef) -> ResolvedAdapter:
        """The version `ref` stands for; asks the hub, and may block on it, unless the answer is known.

        Raises `AdapterNotFound`, in the same words whatever part of the name is unknown, and `HubUnavailable`.
        """
        found = self.cached(ref)
        if found is not None:
            return found
        with self._lock:
            moves = self._moves
        found = self._ask(ref)
        with self._lock:
            if moves == self._moves:
                self._remember(ref, found)
        return found

    def version_of(self, digest: str) -> str | None:
        """A name for `digest` among the known ones, for people."""
        with self._lock:
            return next((known.version for known in self._known.values() if known.digest == digest), None)

    def close(self) -> None:
        """End the watch."""
        self._stop.set()
        self._thread.join()

    def _ask(self, ref: AdapterRef) -> ResolvedAdapter:
        try:
            version = self._hub.resolve(ref)
        except AdapterNotFound:
            # One wording for an unknown name, version or alias: the answer tells nothing about its neighbours.
            raise AdapterNotFound(f"no adapter {ref}") from None
        return ResolvedAdapter(version=version.text, digest=version.digest)

    def _remember(self, ref: AdapterRef, found: ResolvedAdapter) -> None:
        self._known[ref] = found
        self._refs_of.setdefault(ref.full_name, set()).add(ref)
        while len(self._known) > self._max_names:
            self._forget(next(iter(self._known)))

    def _forget(self, ref: AdapterRef) -> None:
        if self._known.pop(ref, None) is not None:
            refs = self._refs_of[ref.full_name]
            refs.discard(ref)
            if not refs:
                del self._refs_of[ref.full_name]

    def _follow(self) -> None:
        reachable = True
        while not self._stop.is_set():
            try:
                for event in self._hub.watch(self._seq, self._stop, self._poll_seconds):
                    reachable = True
                    self._seq = event.seq
                    self._apply(event)
            except HubError as error:
                if reachable:
                    log.warning("the hub's events cannot be followed, known names keep working: %s", error)
                reachable = False
                self._stop.wait(self._poll_seconds)
            except Exception:
                log.exception("following the hub's events failed; trying again")
                self._stop.wait(self._poll_seconds)

    def _apply(self, event: HubEvent) -> None:
        """Forget what `event` may have changed, and learn anew what was known, so that the next request need not."""
        with self._lock:
            self._moves += 1
            touched = [
                ref
                for ref in self._refs_of.get(event.full_name, ())
                if event.kind not in _MOVING or isinstance(ref.selector, Alias)
            ]
            before = {ref: self._known[ref] for ref in touched}
            for ref in touched:
                self._forget(ref)
        for ref in touched:
            try:
                found = self._ask(ref)
            except HubError:
                continue  # gone, or unknown until the hub answers again: whoever names it is told
            if found != before[ref]:
                log.info("%s is now %s", ref, found.version)
            with self._lock:
                self._remember(ref, found)


def hub_fetch(hub: HubFacade) -> AdapterFetch:
    """The engine's way to an adapter's files; raises the hub's errors."""
    from server.adapters.weights import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles

    def fetch(digest: str) -> AdapterFiles:
        version = hub.get(digest)
        check_adapter(version)
        base = version.manifest.base
        return AdapterFiles(
            digest=digest,
            config=hub.read_file(version, CONFIG_FILE),
            weights=hub.read_file(version, WEIGHTS_FILE),
            base_name=base.name,
            base_fingerprint=base.fingerprint,
        )

    return fetch
