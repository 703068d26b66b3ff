"""A hub that gives out nothing but what a trusted key signed: the same policy for `hub pull` and `hub serve`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, cast

from hub.refs import AdapterRef, Digest
from hub.versions import Version

if TYPE_CHECKING:
    from hub.facade import HubFacade
    from hub.progress import Progress
    from hub.signing.policy import TrustPolicy

_MAX_KNOWN: Final = 65_536


def requiring(hub: HubFacade, key_files: Sequence[Path]) -> HubFacade:
    """`hub`, whose versions must be signed by one of these public keys; none given: `hub` as it is.

    Raises KeyUnusable.
    """
    if not key_files:
        return hub
    from hub.signing.policy import TrustPolicy  # loads the cryptography

    return cast("HubFacade", RequiringSignatures(hub, TrustPolicy.read(key_files)))


class RequiringSignatures:
    """A facade whose `resolve`, `get`, `pull` and `read_file` also raise what `TrustPolicy.check` raises.

    A version that passed is not asked for again: signatures are never taken back. Everything else is the hub's own.
    """

    def __init__(self, hub: HubFacade, policy: TrustPolicy) -> None:
        self._hub = hub
        self._policy = policy
        self._good: set[Digest] = set()
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hub, name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hub.close()

    def acting_as(self, actor: str | None) -> RequiringSignatures:
        """See `Hub.acting_as`; what is read through it must be signed just the same."""
        return RequiringSignatures(self._hub.acting_as(actor), self._policy)

    def resolve(self, ref: AdapterRef | str, key: str | None = None) -> Version:
        """See `Hub.resolve`."""
        return self._checked(self._hub.resolve(ref, key))

    def get(self, digest: Digest | str) -> Version:
        """See `Hub.get`."""
        return self._checked(self._hub.get(digest))

    def pull(self, ref: AdapterRef | str, directory: Path | str, progress: Progress | None = None) -> Version:
        """See `Hub.pull`; what is not signed is refused before a byte of it is fetched."""
        version = self.resolve(ref)
        exact = replace(AdapterRef.parse(version.full_name), selector=version.digest)
        return self._hub.pull(exact, directory, progress)

    def read_file(self, version: Version | Digest | str, filename: str) -> bytes:
        """See `Hub.read_file`."""
        found = self._checked(version) if isinstance(version, Version) else self.get(version)
        return self._hub.read_file(found, filename)

    def _checked(self, version: Version) -> Version:
        with self._lock:
            known = version.digest in self._good
        if not known:
            self._policy.check(version, self._hub.signatures(version.digest))
            with self._lock:
                if len(self._good) >= _MAX_KNOWN:
                    self._good.clear()
                self._good.add(version.digest)
        return version
