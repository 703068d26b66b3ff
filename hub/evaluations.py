"""Scores found after a version was pushed: records beside it, since the version itself never changes.

    <hub's directory>/evaluations/<64 digits of the version's digest>/<time>-<random>.json

    {"schema": "loraplex.evaluation/1", "version": "team/x@3", "digest": …, "task": …, "data": {"digest", "examples"},
     "base": {"name", "quantization"}, "metrics": {name: number}, "intervals": {name: [low, high]}, "at": …, "by": …}

Records are added, never changed; of several for a task the newest counts. A sweep takes those of versions it forgot.
They lie with the hub's catalog and are for
hubs that have a directory on this machine: not for those behind a server, nor for PostgreSQL with S3.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from hub import json_text
from hub.errors import BlobCorrupt, EvaluationsUnsupported, HubUnavailable
from hub.place import Place, named
from hub.refs import Digest
from hub.versions import Problem, Version

SCHEMA: Final = "loraplex.evaluation/1"
MAX_RECORD_BYTES: Final = 64 * 1024


@dataclass(frozen=True)
class Evaluation:
    """One version's scores on one task."""

    version: str  # "team/x@3"
    digest: Digest  # the version's
    task: str
    data: Mapping[str, Any]  # "digest" of the questions' file, and how many "examples" were asked
    base: Mapping[str, Any]  # "name" and "quantization" of what the adapter ran on
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]  # 95 %, over the questions
    at: str = ""  # RFC 3339, UTC; given by `add`
    by: str | None = None

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """A record's bytes; raises BlobCorrupt."""
        try:
            value = json_text.parse_object(data, max_bytes=MAX_RECORD_BYTES)
            if value.pop("schema") != SCHEMA:
                raise ValueError("has a schema this release does not read")
            intervals = {name: (float(low), float(high)) for name, (low, high) in value.pop("intervals").items()}
            metrics = {name: float(number) for name, number in value.pop("metrics").items()}
            return cls(digest=Digest.parse(value.pop("digest")), intervals=intervals, metrics=metrics, **value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BlobCorrupt(f"an evaluation's record {error}") from error


@dataclass(frozen=True)
class Recorded:
    """Newest scores of two versions as a gate names them, "task.metric"."""

    candidate: Mapping[str, float]
    current: Mapping[str, float]  # of what the alias holds, by the same questions on the same base
    apart: frozenset[str]  # what that one has by other questions or on another base alone


class Evaluations:
    """The records of one hub; safe to use from several processes."""

    def __init__(self, directory: Path) -> None:
        self._root = directory / "evaluations"

    @classmethod
    def of(cls, hub_url: str | None) -> Self:
        """Those of the hub at `hub_url` (see `hub.place`); raises EvaluationsUnsupported, HubUnavailable."""
        if "://" in named(hub_url) and named(hub_url).startswith(("grpc://", "grpcs://")):
            raise EvaluationsUnsupported("a shared hub keeps no evaluations yet: record them where its directory is")
        place = Place.parse(hub_url)
        if place.directory is None:
            raise EvaluationsUnsupported("a hub in PostgreSQL and S3 has no directory to keep evaluations in")
        return cls(place.directory)

    def add(self, version: Version, found: Evaluation) -> Evaluation:
        """Keep a record of `version`, whole or not at all, with the time; raises HubUnavailable."""
        assert found.digest == version.digest
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        kept = Evaluation(**{**vars(found), "at": stamp})
        directory = self._root / version.digest.hex
        # The file's name is its place in time, to the microsecond.
        name = (
            f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now))}.{int(now % 1 * 1e6):06d}-{uuid.uuid4().hex[:8]}.json"
        )
        data = json_text.canonical({"schema": SCHEMA, **asdict(kept)})
        try:
            directory.mkdir(parents=True, exist_ok=True)
            aside = directory / f".{name}"
            with aside.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            aside.rename(directory / name)
        except OSError as error:
            raise HubUnavailable(f"the evaluation cannot be kept: {os.strerror(error.errno or 0)}") from error
        return kept

    def all_of(self, version: Version) -> list[Evaluation]:
        """Every record of a version, oldest first; raises BlobCorrupt, HubUnavailable."""
        try:
            files = sorted((self._root / version.digest.hex).glob("[0-9]*.json"))
            found = [Evaluation.parse(file.read_bytes()) for file in files]
        except OSError as error:
            raise HubUnavailable(f"the evaluations cannot be read: {os.strerror(error.errno or 0)}") from error
        for each in found:
            if each.digest != version.digest:
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
                had |= _named(each)
            else:
                others |= _named(each).keys()
        scores = {name: number for each in newest.values() for name, number in _named(each).items()}
        return Recorded(scores, had, frozenset(others - had.keys()))

    def digests(self) -> list[Digest]:
        """Of the versions that have records; raises HubUnavailable."""
        try:
            return [
                Digest.of_hex(entry.name) for entry in sorted(self._root.glob("[0-9a-f]*")) if len(entry.name) == 64
            ]
        except OSError as error:
            raise HubUnavailable(f"the evaluations cannot be read: {os.strerror(error.errno or 0)}") from error

    def discard(self, digest: Digest, *, dry_run: bool = False) -> int:
        """Delete the records of a version that is forgotten; their bytes. Raises HubUnavailable."""
        directory = self._root / digest.hex
        try:
            size = sum(file.stat().st_size for file in directory.iterdir())
            if not dry_run:
                shutil.rmtree(directory)
        except OSError as error:
            raise HubUnavailable(f"the evaluations cannot be swept: {os.strerror(error.errno or 0)}") from error
        return size

    def problems(self) -> list[Problem]:
        """Records that cannot be read, or are about another version than they lie with."""
        found = []
        for digest in self.digests():
            for file in sorted((self._root / digest.hex).glob("[0-9]*.json")):
                try:
                    about = Evaluation.parse(file.read_bytes())
                    if about.digest == digest:
                        continue
                    what = f"an evaluation's record of {about.version} is about another version"
                except (BlobCorrupt, OSError) as error:
                    what = str(error)
                name = f"evaluations/{digest.hex[:16]}…/{file.name}"
                found.append(Problem(f"sha256:{digest.hex[:16]}…", name, BlobCorrupt.reason, what))
        return found


def _named(one: Evaluation) -> dict[str, float]:
    return {f"{one.task}.{metric}": number for metric, number in one.metrics.items()}
