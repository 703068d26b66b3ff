"""Scores found after a version was pushed: records beside it, since the version itself never changes.

    <hub's directory, or the bucket's prefix>/evaluations/<64 digits of the version's digest>/<time>-<random>.json

Records (see `hub.evaluation`) are added, never changed; of several for a task the newest counts. A sweep takes those of
versions it forgot. They lie with the hub's catalog where that is in a directory, and in the bucket where the hub has no
directory on this machine.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Self

from hub.errors import BlobCorrupt, EvaluationRefused, EvaluationsUnsupported, HubUnavailable, StorageUnreachable
from hub.evaluation import Evaluation
from hub.evaluation_records import DirectoryRecords, Records
from hub.place import Place
from hub.refs import Digest
from hub.versions import Problem, Version

if TYPE_CHECKING:
    from hub.catalog import Catalog
    from hub.catalog_rows import Record

MAX_RECORDS: Final = 1000  # of one version


@dataclass(frozen=True)
class Recorded:
    """Newest scores of two versions as a gate names them, "task.metric"."""

    candidate: Mapping[str, float]
    current: Mapping[str, float]  # of what the alias holds, by the same questions on the same base
    apart: frozenset[str]  # what that one has by other questions or on another base alone


class Evaluations:
    """The records of one hub; safe to use from several processes."""

    def __init__(self, records: Records) -> None:
        self._records = records

    @classmethod
    def at(cls, place: Place) -> Self:
        """Those of the hub at a place; raises HubUnavailable."""
        if place.directory is not None:
            return cls(DirectoryRecords(place.directory / "evaluations"))
        assert place.bucket is not None
        from hub.blobs.bucket import Bucket  # the S3 client is large; hubs without one do not load it
        from hub.s3_evaluations import S3Records

        return cls(S3Records(Bucket.parse(place.bucket)))

    def add(self, version: Version | Record, found: Evaluation) -> Evaluation:
        """Keep a record of `version`, whole or not at all, with the time; raises EvaluationRefused, HubUnavailable."""
        assert found.digest == version.digest
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        kept = replace(found, version=version.text, at=stamp)
        data = kept.encode()
        if len(self._records.names(version.digest)) >= MAX_RECORDS:
            raise EvaluationRefused(f"{version.text} has {MAX_RECORDS} evaluations, and no version has more")
        # The record's name is its place in time, to the microsecond.
        name = (
            f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now))}.{int(now % 1 * 1e6):06d}-{uuid.uuid4().hex[:8]}.json"
        )
        self._records.write(version.digest, name, data)
        return kept

    def all_of(self, version: Version | Record) -> list[Evaluation]:
        """Every record of a version, oldest first; raises BlobCorrupt, HubUnavailable."""
        found = [Evaluation.parse(data) for _, data in self._records.read(version.digest)]
        if any(each.digest != version.digest for each in found):
            raise BlobCorrupt(f"an evaluation's record of {version.text} is about another version")
        return found

    def recorded(self, version: Version, current: Version | None) -> Recorded:
        """What a gate may ask of `version`, to be held to `current`; raises what `all_of` raises."""
        newest = {each.task: each for each in self.all_of(version)}
        had: dict[str, float] = {}
        others: set[str] = set()
        for each in self.all_of(current) if current is not None else ():
            asked = newest.get(each.task)
            if asked is not None and (each.data, each.base) == (asked.data, asked.base):
                had |= each.named_metrics()
            else:
                others |= each.named_metrics().keys()
        scores = {name: number for each in newest.values() for name, number in each.named_metrics().items()}
        return Recorded(scores, had, frozenset(others - had.keys()))

    def digests(self) -> list[Digest]:
        """Of the versions that have records; raises HubUnavailable."""
        return self._records.digests()

    def discard(self, digest: Digest, *, dry_run: bool = False) -> int:
        """Delete the records of a version that is forgotten; their bytes. Raises HubUnavailable."""
        size = self._records.size(digest)
        if not dry_run:
            self._records.remove(digest)
        return size

    def problems(self) -> list[Problem]:
        """Records that cannot be read, or are about another version than they lie with."""
        return [problem for digest in self.digests() for problem in self._problems_of(digest)]

    def _problems_of(self, digest: Digest) -> list[Problem]:
        short, place = f"sha256:{digest.hex[:16]}…", f"evaluations/{digest.hex[:16]}…"
        found = []
        try:
            records = self._records.read(digest)
        except StorageUnreachable:
            raise
        except HubUnavailable as error:
            return [Problem(short, place, BlobCorrupt.reason, str(error))]
        for name, data in records:
            try:
                about = Evaluation.parse(data)
                if about.digest == digest:
                    continue
                what = f"an evaluation's record of {about.version} is about another version"
            except BlobCorrupt as error:
                what = str(error)
            found.append(Problem(short, f"{place}/{name}", BlobCorrupt.reason, what))
        return found


class KeptEvaluations:
    """The part of `hub.hub.Hub` that is about evaluations."""

    _catalog: Catalog
    _evaluations: Evaluations | None

    def add_evaluation(self, found: Evaluation) -> Evaluation:
        """Keep scores of the version that they are about, with the time and this hub's actor; the record as it is kept.

        Raises EvaluationRefused, AdapterNotFound, EvaluationsUnsupported where the hub was opened without evaluations.
        """
        self._catalog.check_writable()
        record = self._catalog.get(Digest.parse(found.digest))
        if self._evaluations is None:
            raise EvaluationsUnsupported("evaluations are recorded where the hub is there, not offline")
        return self._evaluations.add(record, replace(found, by=self._catalog.actor or None))

    def evaluations(self, digest: Digest | str) -> list[Evaluation]:
        """What was recorded of the version with this digest, oldest first; raises BlobCorrupt, AdapterNotFound."""
        record = self._catalog.get(Digest.parse(digest))
        return self._evaluations.all_of(record) if self._evaluations is not None else []
