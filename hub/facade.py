"""What a hub offers, wherever it lies: the local `hub.hub.Hub` and a hub behind a server keep the same contract.

The docstrings of `hub.hub.Hub` are the contract in full; one suite (tests/hub) runs over every implementation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from hub.arrivals import Adopted, AliasArrival, Arrival, LayOut
from hub.evaluation import Evaluation
from hub.gate import Gate, Promotion
from hub.gate_evaluation import Scores
from hub.lineage import Lineage
from hub.progress import Progress
from hub.refs import AdapterRef, Digest
from hub.search import Page, Query
from hub.sweep import GRACE_SECONDS, RETENTION_SECONDS
from hub.versions import AliasState, Event, Lease, Problem, PushResult, Swept, Version

if TYPE_CHECKING:
    from hub.diff import Diff


class HubFacade(Protocol):
    """A hub, opened."""

    def acting_as(self, actor: str | None) -> HubFacade:
        """This hub; what is written through the result is written by `actor`. Close only one of the two."""

    def close(self) -> None:
        """Give back the connections."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def push(
        self,
        directory: Path | str,
        ref: AdapterRef | str,
        *,
        base: str | None = None,
        aliases: Sequence[str] = (),
        parents: Sequence[AdapterRef | str] = (),
        creator: str | None = None,
        progress: Progress | None = None,
    ) -> PushResult:
        """Store the PEFT LoRA or the whole model in `directory` as the next version of `ref`."""

    def resolve(self, ref: AdapterRef | str, key: str | None = None) -> Version:
        """The version `ref` names now; raises AdapterNotFound, VersionNotFound or AliasNotFound."""

    def get(self, digest: Digest | str) -> Version:
        """The version with this digest; raises AdapterNotFound."""

    def pull(self, ref: AdapterRef | str, directory: Path | str, progress: Progress | None = None) -> Version:
        """Write the version `ref` names into `directory`, which is absent or empty; PEFT loads it from there."""

    def read_file(self, version: Version | Digest | str, filename: str) -> bytes:
        """The bytes of one file of a version (or of the version with this digest), checked against the manifest."""

    def add_signature(self, digest: Digest | str, signature: bytes) -> bool:
        """Keep a signature of the version with this digest; False where it is there already."""

    def signatures(self, digest: Digest | str) -> tuple[bytes, ...]:
        """The signatures of the version with this digest, as they were added; whoever trusts a key checks them."""

    def add_evaluation(self, found: Evaluation) -> Evaluation:
        """Keep scores of the version that they are about, with the time and the actor; the record as it is kept."""

    def evaluations(self, digest: Digest | str) -> list[Evaluation]:
        """What was recorded of the version with this digest, oldest first; raises BlobCorrupt, AdapterNotFound."""

    def adopt(
        self,
        arrivals: Sequence[Arrival],
        lay_out: LayOut,
        *,
        aliases: Sequence[AliasArrival] = (),
        renumber: bool = False,
        progress: Progress | None = None,
    ) -> list[Adopted]:
        """Enter versions of another hub as they are there, all or none; what became of each."""

    def diff(self, a: AdapterRef | str, b: AdapterRef | str) -> Diff:
        """How the version `b` names differs from the one `a` names; raises BlobCorrupt and what `resolve` raises."""

    def versions(self, pattern: str | None = None) -> list[Version]:
        """All versions whose adapter's name matches the shell pattern ("team/*"; None: all), by name and number."""

    def search(self, query: Query) -> Page:
        """The versions that meet a query, a page at a time, by name and number."""

    def lineage(self, ref: AdapterRef | str) -> Lineage:
        """What a version was made from, back to the first, and what was made from it; raises what `resolve` does."""

    def aliases(self, full_name: str) -> dict[str, AliasState]:
        """What the aliases of an adapter hold now, by alias; raises AdapterNotFound, RefInvalid."""

    def tag(self, ref: AdapterRef | str, alias: str, expect: int | None = None) -> Version:
        """Point `alias` at the version `ref` names."""

    def split(
        self, targets: Sequence[tuple[AdapterRef | str, int]], alias: str, expect: int | None = None
    ) -> AliasState:
        """Point `alias` at several versions of one adapter with weights from 1 to 1,000,000 (a canary)."""

    def promote(self, ref: AdapterRef | str, alias: str, gate: Gate, scores: Scores | None = None) -> Promotion:
        """Point `alias` at the version `ref` names, provided its metrics meet `gate`: recorded ones, and `scores`."""

    def rollback(self, full_name: str, alias: str, expect: int | None = None) -> AliasState:
        """Give `alias` back what it held before its last move; again: the move before that."""

    def untag(self, full_name: str, alias: str, expect: int | None = None) -> Version:
        """Remove an alias; the version it held. Raises AliasNotFound, AdapterNotFound, AliasMoved (see `tag`)."""

    def remove(self, ref: AdapterRef | str) -> Version:
        """Mark the version `ref` names as removed: it resolves no more, its bytes stay until a sweep takes them."""

    def restore(self, ref: AdapterRef | str) -> Version:
        """Take a removal back; `ref` has a number or a digest. Raises NotRestorable, VersionNotFound, RefInvalid."""

    def sweep(
        self,
        *,
        retention_seconds: float = RETENTION_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        dry_run: bool = False,
    ) -> Swept:
        """Give back what nothing needs; see `hub.sweep`. With `dry_run` say what that would be."""

    def lease(self, ref: AdapterRef | str, holder: str, seconds: float | None = None) -> Lease:
        """Keep the version `ref` names from being removed, for `seconds` from now or (None) until released: a pin."""

    def release(self, ref: AdapterRef | str, holder: str) -> None:
        """Take a lease or pin back; nothing happens where there is none. Raises what `resolve` raises."""

    def leases(self, full_name: str | None = None) -> list[Lease]:
        """The leases and pins that hold versions now, of one adapter or (None) of all."""

    def events(self, since_seq: int = 0, limit: int = 1000, full_name: str | None = None) -> list[Event]:
        """Up to `limit` events after number `since_seq`, oldest first; of one adapter or (None) of all."""

    def last_seq(self) -> int:
        """The newest event's number; 0 in a new hub."""

    def watch(self, since_seq: int, stop: threading.Event, poll_seconds: float = 0.2) -> Iterator[Event]:
        """Events after number `since_seq` as they come, in order, none twice, until `stop` is set."""

    def verify(self, ref: AdapterRef | str | None = None, progress: Progress | None = None) -> list[Problem]:
        """Read and hash everything `ref` names (None: the whole hub, catalog included); what is wrong with it."""

    def fsck(self, progress: Progress | None = None) -> list[Problem]:
        """Compare the catalog with the journal and the blobs' presence; what is wrong. `verify` reads the bytes."""
