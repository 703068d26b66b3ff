"""The catalog: which versions exist, what the aliases hold, and every change as a numbered event.

One write is one transaction: version, alias moves and their events appear together or not at all. Writers take turns
(`hub.sqlite`, `hub.postgres`) and number events inside, so numbers have no gaps and readers see them in order. After
the commit, and before the write is acknowledged, its events go to the journal beside the blobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import sqlalchemy as sa

from hub import (
    catalog_adoption,
    catalog_check,
    catalog_removal,
    catalog_rows,
    catalog_search,
    catalog_signatures,
    journal,
    tables,
)
from hub.alias_history import before_now, check_expected
from hub.arrivals import AliasArrival
from hub.catalog_rows import Record
from hub.catalog_writer import Step, Writer, now
from hub.errors import AdapterNotFound, AliasMoved, BlobsSwept, HubReadOnly, HubUnavailable, QueryInvalid
from hub.journal import Journal
from hub.refs import LATEST, AdapterRef, Digest
from hub.search import Query
from hub.sqlite import cause
from hub.transactions import Question, T, asked, read, writing
from hub.versions import AliasState, Event, Lease

__all__ = ["Catalog", "Publication", "Published", "Record", "Step", "now"]
_MAX_SEQ = 2**63 - 1

Published = Literal["created", "known", "restored"]  # "restored": this content was removed, and is back


@dataclass(frozen=True)
class Publication:
    """A version about to be entered; its blobs are stored already."""

    full_name: str
    digest: Digest
    content: Digest  # equal contents under one name are one version
    manifest: bytes


class Catalog:
    """The catalog in one database. Methods are safe to call from several threads and processes.

    All raise HubUnavailable where the database cannot be reached, read or written; where it was opened for reading,
    those that write raise HubReadOnly.
    """

    def __init__(
        self,
        engine: sa.Engine,
        record: Journal,
        *,
        actor: str | None = None,
        step: Step = lambda name: None,
        read_only: bool = False,
    ) -> None:
        self._engine = engine
        self._journal = record
        self._actor = actor
        self._step = step
        self._read_only = read_only

    def acting_as(self, actor: str | None) -> Catalog:
        """The same catalog; what is written through it is written by `actor`."""
        return Catalog(self._engine, self._journal, actor=actor, step=self._step, read_only=self._read_only)

    @property
    def actor(self) -> str | None:
        """By whom is written what is written through it."""
        return self._actor

    @property
    def engine(self) -> sa.Engine:
        """The database, for tables that are no part of the catalog (the shared server's tokens)."""
        return self._engine

    def close(self) -> None:
        """Give back the connections."""
        self._engine.dispose()

    def check_writable(self) -> None:
        """Raise HubReadOnly where the hub was opened for reading."""
        if self._read_only:
            raise HubReadOnly("the hub cannot be written from here: its directory is read-only")

    # Versions

    def publish(
        self, publication: Publication, aliases: Sequence[str], missing: Callable[[], bool] = lambda: False
    ) -> tuple[Record, Published]:
        """Enter a version and point `aliases` at it; the version's record, and what became of it.

        A new version also takes the alias "latest". Content that is there under this name already stays the version it
        is: only `aliases` move; where it was removed it is restored, and takes "latest" too. `missing` is asked with
        the write lock held, where no sweep runs; when it says yes nothing is entered and BlobsSwept is raised.
        """
        name = publication.full_name
        with self._writing() as writer:
            record = catalog_rows.select_record(
                writer.connection, tables.versions.c.full_name == name, tables.versions.c.content == publication.content
            )
            if missing():
                raise BlobsSwept("a sweep took bytes of this push before it was published: push again")
            outcome: Published = "known"
            if record is None:
                record, outcome = writer.new_version(name, publication.digest, publication.manifest), "created"
            elif record.removed is not None:
                record, outcome = catalog_removal.bring_back(writer, record), "restored"
            for alias in dict.fromkeys(aliases if outcome == "known" else [LATEST, *aliases]):
                writer.point(name, alias, catalog_rows.alias_state(writer.connection, name, alias), [(record, 1)])
        return record, outcome

    def adopt(
        self, adoptions: Sequence[catalog_adoption.Adoption], aliases: Sequence[AliasArrival],
        missing: Callable[[], bool], renumber: bool,
    ) -> list[catalog_adoption.Entered]:  # fmt: skip
        """Enter versions of another hub, all or none; see `hub.catalog_adoption`, and `publish` for `missing`."""
        with self._writing() as writer:
            if missing():
                raise BlobsSwept("a sweep took bytes of this import before it was entered: import again")
            return catalog_adoption.adopt(writer, adoptions, aliases, renumber=renumber)

    def find(self, full_name: str, content: Digest) -> Record | None:
        """The version of this adapter with this content, removed or not, if there is one."""
        v = tables.versions.c
        return self._asked(
            lambda connection: catalog_rows.select_record(connection, v.full_name == full_name, v.content == content)
        )

    def resolve(self, ref: AdapterRef, key: str | None = None) -> Record:
        """See `hub.catalog_rows.resolve`."""
        return self.resolve_at(ref, key)[0]

    def resolve_at(self, ref: AdapterRef, key: str | None = None) -> tuple[Record, int]:
        """As `resolve`, with the newest event's number at that moment."""
        found = self._asked(lambda connection: catalog_rows.named(connection, ref, key))
        # What of it is unknown takes further statements to tell.
        return found or self._read(lambda connection: catalog_rows.resolve_at(connection, ref, key))

    def get(self, digest: Digest) -> Record:
        """The version with this digest; raises AdapterNotFound, VersionNotFound where it was removed."""
        v = tables.versions.c
        record = self._asked(lambda connection: catalog_rows.select_record(connection, v.digest == digest))
        if record is None:
            raise AdapterNotFound(f"there is no version {digest} in this hub")
        return catalog_rows.standing(record)

    def records(self) -> list[Record]:
        """All versions, removed ones too, by name and number."""
        v = tables.versions
        query = sa.select(v).order_by(v.c.full_name, v.c.number)
        return self._asked(lambda connection: [catalog_rows.record_of(row) for row in connection.execute(query)])

    def search(self, query: Query) -> tuple[list[Record], dict[Digest, tuple[str, ...]], bool]:
        """Versions that are there and meet the query, by name and number; their aliases; whether there are more."""
        found = self._asked(lambda connection: catalog_search.search(connection, query, at_once=True))
        if found is None:
            found = self._read(lambda connection: catalog_search.search(connection, query))
        assert found is not None
        return found

    def names_file(self, full_name: str, digest: Digest) -> bool:
        """Whether a version of this adapter, removed or not, has a file with this digest."""
        f = tables.files.c
        query = sa.select(sa.literal(1)).where(f.full_name == full_name, f.sha256 == digest).limit(1)
        return self._asked(lambda connection: connection.execute(query).first()) is not None

    def children(self, digest: Digest) -> list[Record]:
        """The versions that name this one as a parent, by name and number."""
        return self._asked(lambda connection: catalog_search.naming(connection, digest))

    def sign(self, digest: Digest, signature: Digest, missing: Callable[[], bool]) -> bool:
        """Note that the version with this digest has a signature; see `hub.catalog_signatures.enter`, and `publish`."""
        record = self.get(digest)
        with self._writing() as writer:
            if missing():
                raise BlobsSwept("a sweep took the signature before it was noted: add it again")
            record = catalog_rows.there(writer.connection, record.full_name, record.number)
            return catalog_signatures.enter(writer, record, signature)

    def signatures(self, record: Record) -> list[Digest]:
        """The digests of a version's signatures."""
        return self._asked(lambda connection: catalog_signatures.of(connection, record))

    def all_signatures(self) -> list[tuple[str, int, Digest]]:
        """Every signature, with the name and number of its version."""
        return self._asked(lambda connection: list(catalog_signatures.everywhere(connection)))

    # Aliases

    def aliases(self, full_name: str) -> dict[str, AliasState]:
        """What every alias of an adapter holds, by alias; raises AdapterNotFound."""
        found = self._asked(lambda connection: catalog_rows.alias_states(connection, full_name))
        return found or self._read(lambda connection: catalog_rows.known_alias_states(connection, full_name))

    def tag(
        self, refs: Sequence[tuple[AdapterRef, int]], alias: str, expect: int | None, *,
        generation: int | None = None, note: str | None = None,
    ) -> AliasState:  # fmt: skip
        """Point `alias` at the versions that `refs` (of one adapter) name, with their weights; what it holds then.

        With `expect` only if it holds that version alone now (0: does not exist), with `generation` only if it has
        not moved since; raises AliasMoved otherwise, and what `resolve` raises. Pointing an alias at what it holds
        already changes nothing and enters no event.
        """
        name = refs[0][0].full_name
        with self._writing() as writer:
            records = [(catalog_rows.resolve(writer.connection, ref), weight) for ref, weight in refs]
            if len({record.number for record, _ in records}) < len(records):
                raise QueryInvalid("the same version is named twice")
            held = catalog_rows.alias_state(writer.connection, name, alias)
            check_expected(name, alias, held, expect)
            if generation is not None and (held.generation if held else 0) != generation:
                raise AliasMoved(f"{name}:{alias} was moved by somebody else just now")
            writer.point(name, alias, held, records, note)
            state = catalog_rows.alias_state(writer.connection, name, alias)
        assert state is not None
        return state

    def untag(self, full_name: str, alias: str, expect: int | None) -> Record:
        """Remove an alias; the version it held. Raises AliasNotFound, AliasMoved (see `tag`), AdapterNotFound."""
        with self._writing() as writer:
            record = catalog_rows.resolve(writer.connection, AdapterRef.parse(f"{full_name}:{alias}"))
            held = catalog_rows.alias_state(writer.connection, full_name, alias)
            assert held is not None
            check_expected(full_name, alias, held, expect)
            writer.drop_alias(record, alias, held)
        return record

    def rollback(self, full_name: str, alias: str, expect: int | None) -> AliasState:
        """Give an alias back what it held before its last move; see `hub.alias_history`.

        Raises NothingToRollBack, AliasMoved, AdapterNotFound, AliasNotFound where it never was, VersionNotFound where
        what it held is removed.
        """
        with self._writing() as writer:
            connection = writer.connection
            e = tables.events.c
            history = catalog_rows.select_events(connection, e.full_name == full_name, e.alias == alias)
            held = catalog_rows.alias_state(connection, full_name, alias)
            if not history:
                catalog_rows.resolve(connection, AdapterRef.parse(f"{full_name}:{alias}"))
            check_expected(full_name, alias, held, expect)
            wanted = before_now(f"{full_name}:{alias}", history)
            records = [(catalog_rows.there(connection, full_name, number), weight) for number, weight in wanted]
            writer.point(full_name, alias, held, records, "rollback")
            state = catalog_rows.alias_state(connection, full_name, alias)
        assert state is not None
        return state

    # Removal

    def remove(self, ref: AdapterRef) -> Record:
        """Mark a version as removed; raises VersionHeld, and what `resolve` raises."""
        with self._writing() as writer:
            return catalog_removal.remove(writer, catalog_rows.resolve(writer.connection, ref))

    def restore(self, ref: AdapterRef) -> Record:
        """Take the mark back; raises NotRestorable, VersionNotFound, AdapterNotFound, RefInvalid for an alias."""
        with self._writing() as writer:
            return catalog_removal.restore(writer, ref)

    def expired(self, removed_before: str) -> list[Record]:
        """The versions that were marked as removed up to this time."""
        return self._asked(lambda connection: catalog_removal.expired(connection, removed_before))

    def purge(self, records: Sequence[Record]) -> list[Record]:
        """Forget these versions for good, but for those that were restored meanwhile; which they were."""
        with self._writing() as writer:
            return catalog_removal.purge(writer, records)

    def unreferenced(self, digests: Sequence[Digest], leaving: Sequence[Record] = ()) -> list[Digest]:
        """Those of `digests` that no version needs, versions in `leaving` not counted."""
        return self._read(lambda connection: catalog_removal.unreferenced(connection, digests, leaving))

    def sweep(self, digests: Sequence[Digest], delete: Callable[[Digest], None]) -> list[Digest]:
        """Call `delete` for those of `digests` that no version needs, while no version can be published."""
        with self._writing() as writer:
            found = catalog_removal.unreferenced(writer.connection, digests)
            for digest in found:
                delete(digest)
        return found

    def lease(self, ref: AdapterRef, holder: str, seconds: float | None) -> Lease:
        """Keep a version from being removed for `seconds` from now (None: until released); again: for longer."""
        expires = None if seconds is None else time.time() + seconds
        with self._writing() as writer:
            return catalog_removal.lease(writer, catalog_rows.resolve(writer.connection, ref), holder, expires)

    def release(self, ref: AdapterRef, holder: str) -> None:
        """Take a lease or pin back; nothing happens where there is none."""
        with self._writing() as writer:
            catalog_removal.release(writer, catalog_rows.resolve(writer.connection, ref), holder)

    def leases(self, full_name: str | None) -> list[Lease]:
        """What is held now, of one adapter or of all."""
        return self._asked(lambda connection: catalog_removal.leases(connection, full_name))

    # Events

    def events(self, since_seq: int, limit: int, full_name: str | None = None) -> list[Event]:
        """Up to `limit` events with seq > `since_seq`, in order; of one adapter or of all."""
        e = tables.events.c
        conditions = [e.seq > min(since_seq, _MAX_SEQ)] + ([e.full_name == full_name] if full_name else [])
        return self._asked(lambda connection: catalog_rows.select_events(connection, *conditions, limit=limit))

    def last_seq(self) -> int:
        """The newest event's number, 0 where nothing happened yet."""
        return self._asked(catalog_rows.last_seq)

    def settle(self) -> None:
        """Write to the journal what it lacks of the catalog's events."""
        self._settle(self._asked(catalog_rows.last_batch))

    def behind_journal(self) -> bool:
        """Whether the journal has writes that this catalog lacks: it was put back from a backup, or lost its end."""
        last = self.last_seq()
        while self._journal.has(last + 1):
            seen, last = last, self.last_seq()
            if last == seen:
                return True
        return False

    def journal_events(self) -> Iterator[Event]:
        """The journal's events, in order; raises BlobCorrupt at a record that is damaged or missing."""
        return journal.read_events(self._journal)

    def check(self) -> list[str]:
        """What does not fit together within the database, in words; see `hub.catalog_check`."""
        return self._read(catalog_check.check)

    def replace(self, fill: Callable[[Writer], None]) -> None:
        """Empty every table and let `fill` enter the rows anew, in one transaction."""
        with self._writing() as writer:
            for table in reversed(tables.metadata.sorted_tables):
                writer.connection.execute(sa.delete(table))
            fill(writer)

    def _settle(self, batch: int | None) -> None:
        """Write the journal's records up to `batch`, oldest first: a record is there only when all before it are."""
        lacking: list[int] = []
        while batch is not None and not self._journal.has(batch):
            lacking.append(batch)
            batch = self._asked(partial(catalog_rows.last_batch, before=batch))
        for number in reversed(lacking):
            events = self._asked(partial(catalog_rows.events_of, batch=number))
            self._journal.put(number, journal.encode(events))

    def _asked(self, question: Question[T]) -> T:
        with _translated():
            return asked(self._engine, question)

    def _read(self, question: Question[T]) -> T:
        with _translated():
            return read(self._engine, question)

    @contextmanager
    def _writing(self) -> Iterator[Writer]:
        self.check_writable()
        with _translated():
            self._step("catalog:begin")
            with writing(self._engine) as connection:
                writer = Writer(connection, self._step, self._actor)
                yield writer
                if writer.batch is not None and self._journal.has(writer.batch):
                    raise HubUnavailable(journal.OTHER_STORY)
                self._step("catalog:commit")
        self._step("catalog:committed")
        if writer.batch is None:
            self.settle()  # said again because an earlier answer got lost: its record may be lacking
        else:
            self._settle(writer.batch)
        self._step("journal:done")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (sa.exc.DBAPIError, sa.exc.TimeoutError, UnicodeDecodeError) as error:
        raise HubUnavailable("the hub's catalog cannot be used", cause(error)) from error
