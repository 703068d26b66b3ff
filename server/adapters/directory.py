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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hub.canary import pick, primary
from hub.errors import AdapterNotFound, HubError
from hub.kinds import check_adapter
from hub.refs import AdapterRef, Alias
from hub.versions import Target

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


class HubAlias(Protocol):
    """What the directory reads of an alias."""

    @property
    def targets(self) -> Sequence[Target]:
        """The versions it holds, with their weights."""


class HubReader(Protocol):
    """The part of `hub.hub.Hub` the directory uses; its methods raise `HubError`s."""

    def resolve(self, ref: AdapterRef) -> HubVersion:
        """The version that `ref` means now."""

    def aliases(self, full_name: str) -> Mapping[str, HubAlias]:
        """What every alias of an adapter holds, by alias."""

    def last_seq(self) -> int:
        """Sequence number of the newest event."""

    def watch(self, since_seq: int, stop: threading.Event, poll_seconds: float) -> Iterator[HubEvent]:
        """Events after `since_seq` as they come, until `stop` is set."""


@dataclass(frozen=True)
class ResolvedAdapter:
    """The version a name stood for at one moment."""

    version: str  # "team/x@3"
    digest: str

    def pick(self, key: str | None) -> ResolvedAdapter:
        """This one, whatever the key."""
        return self

    def versions(self) -> tuple[ResolvedAdapter, ...]:
        """This one."""
        return (self,)


@dataclass(frozen=True)
class _Split:
    """What an alias held at one moment, for callers with a routing key; see `hub.canary`."""

    full_name: str
    alias: str
    targets: tuple[Target, ...]

    def pick(self, key: str | None) -> ResolvedAdapter:
        """The version that this key gets, as the hub itself would say."""
        found = primary(self.targets) if key is None else pick(self.targets, self.full_name, self.alias, key)
        return self._resolved(found)

    def versions(self) -> tuple[ResolvedAdapter, ...]:
        """All that it holds."""
        return tuple(map(self._resolved, self.targets))

    def _resolved(self, target: Target) -> ResolvedAdapter:
        return ResolvedAdapter(version=f"{self.full_name}@{target.version}", digest=target.digest)

    @property
    def version(self) -> str:
        """For the log: "team/x@3 (weight 9), team/x@4 (weight 1)"."""
        return ", ".join(f"{self.full_name}@{each.version} (weight {each.weight})" for each in self.targets)


@dataclass(frozen=True)
class _Name:
    """What is asked of the hub once and remembered: one version, or an alias with all that it holds."""

    ref: AdapterRef
    whole: bool

    @classmethod
    def of(cls, ref: AdapterRef, key: str | None) -> _Name:
        """What a request for `ref` with this routing key needs to know."""
        return cls(ref, key is not None and isinstance(ref.selector, Alias))


class AdapterDirectory:
    """Names → versions, with one thread following the hub's events. Safe to use from any thread.

    Raises `HubUnavailable` at construction when the hub cannot be read. Call `close` to end the thread.
    """

    def __init__(self, hub: HubReader, *, poll_seconds: float = 0.2, max_names: int = 65_536) -> None:
        self._hub = hub
        self._poll_seconds = poll_seconds
        self._max_names = max_names
        self._lock = threading.Lock()
        self._known: OrderedDict[_Name, ResolvedAdapter | _Split] = OrderedDict()  # least recently used first
        self._names_of: dict[str, set[_Name]] = {}
        self._moves = 0  # events seen; a hub answer read before an event and stored after it would be stale for good
        self._stop = threading.Event()
        self._seq = hub.last_seq()
        self._thread = threading.Thread(target=self._follow, name="loraplex-directory", daemon=True)
        self._thread.start()

    def cached(self, ref: AdapterRef, key: str | None = None) -> ResolvedAdapter | None:
        """The version `ref` stands for if that is known without asking the hub; never blocks.

        Where `ref` is an alias split over several versions, `key` picks one; without a key it is the heaviest.
        """
        name = _Name.of(ref, key)
        with self._lock:
            found = self._known.get(name)
            if found is None:
                return None
            self._known.move_to_end(name)
        return found.pick(key)

    def resolve(self, ref: AdapterRef, key: str | None = None) -> ResolvedAdapter:
        """The version `ref` stands for; asks the hub, and may block on it, unless the answer is known.

        Raises `AdapterNotFound`, in the same words whatever part of the name is unknown, and `HubUnavailable`.
        """
        known = self.cached(ref, key)
        if known is not None:
            return known
        with self._lock:
            moves = self._moves
        name = _Name.of(ref, key)
        found = self._ask(name)
        with self._lock:
            if moves == self._moves:
                self._remember(name, found)
        return found.pick(key)

    def version_of(self, digest: str) -> str | None:
        """A name for `digest` among the known ones, for people."""
        with self._lock:
            held = [each for known in self._known.values() for each in known.versions()]
        return next((each.version for each in held if each.digest == digest), None)

    def close(self) -> None:
        """End the watch."""
        self._stop.set()
        self._thread.join()

    def _ask(self, name: _Name) -> ResolvedAdapter | _Split:
        ref = name.ref
        # One wording for an unknown name, version or alias: the answer tells nothing about its neighbours.
        unknown = AdapterNotFound(f"no adapter {ref}")
        try:
            if not name.whole:
                version = self._hub.resolve(ref)
                return ResolvedAdapter(version=version.text, digest=version.digest)
            held = self._hub.aliases(ref.full_name)
        except AdapterNotFound:
            raise unknown from None
        assert isinstance(ref.selector, Alias)
        state = held.get(ref.selector.name)
        if state is None:
            raise unknown
        return _Split(ref.full_name, ref.selector.name, tuple(state.targets))

    def _remember(self, name: _Name, found: ResolvedAdapter | _Split) -> None:
        self._known[name] = found
        self._names_of.setdefault(name.ref.full_name, set()).add(name)
        while len(self._known) > self._max_names:
            self._forget(next(iter(self._known)))

    def _forget(self, name: _Name) -> None:
        if self._known.pop(name, None) is not None:
            names = self._names_of[name.ref.full_name]
            names.discard(name)
            if not names:
                del self._names_of[name.ref.full_name]

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
                name
                for name in self._names_of.get(event.full_name, ())
                if event.kind not in _MOVING or isinstance(name.ref.selector, Alias)
            ]
            before = {name: self._known[name] for name in touched}
            for name in touched:
                self._forget(name)
        for name in touched:
            try:
                found = self._ask(name)
            except HubError:
                continue  # gone, or unknown until the hub answers again: whoever names it is told
            if found != before[name]:
                log.info("%s is now %s", name.ref, found.version)
            with self._lock:
                self._remember(name, found)


def hub_fetch(hub: HubFacade, fetched: Callable[[str, str], None] = lambda full_name, digest: None) -> AdapterFetch:
    """The engine's way to an adapter's files; raises the hub's errors. `fetched` is told name and digest of each."""
    from hub.facts import corrects_nf4
    from server.adapters.weights import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles

    def fetch(digest: str) -> AdapterFiles:
        version = hub.get(digest)
        check_adapter(version)
        fetched(version.full_name, version.digest)
        base = version.manifest.base
        return AdapterFiles(
            digest=digest,
            config=hub.read_file(version, CONFIG_FILE),
            weights=hub.read_file(version, WEIGHTS_FILE),
            base_name=base.name,
            base_fingerprint=base.fingerprint,
            corrects_nf4=corrects_nf4(version.manifest.recipe),
        )

    return fetch
