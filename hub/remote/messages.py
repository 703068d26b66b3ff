"""The hub's nouns ⇄ messages of `loraplex.v1.Registry`; both ends use these."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import Final, cast

from hub.base_identity import BaseIdentity
from hub.errors import BlobCorrupt, QueryInvalid
from hub.gate import Gate
from hub.gate_evaluation import Scores
from hub.manifest import Manifest
from hub.refs import Digest
from hub.search import COMPARE, METRIC_NAME, MetricTest, Query, parse_bound
from hub.versions import AliasState, Event, EventKind, Held, Lease, Problem, Target, Version
from protos.loraplex.v1 import registry_pb2 as pb

MAX_SOURCE_CHARS: Final = 300
MAX_PAGE: Final = 1000  # versions that one search of the wire asks for


def version_message(version: Version) -> pb.AdapterVersion:
    """A version, with the manifest's own bytes."""
    return pb.AdapterVersion(
        full_name=version.full_name,
        number=version.number,
        digest=version.digest,
        manifest=version.manifest.canonical(),
    )


def version_of(message: pb.AdapterVersion) -> Version:
    """The version in a message; raises BlobCorrupt where the manifest is not the one its digest names."""
    if hashlib.sha256(message.manifest).hexdigest() != message.digest.removeprefix("sha256:"):
        raise BlobCorrupt(f"the server's manifest of {message.full_name}@{message.number} is not that of its digest")
    manifest = Manifest.parse(message.manifest)
    if manifest.name != message.full_name:
        raise BlobCorrupt(f"the server's manifest of {message.full_name}@{message.number} is of another adapter")
    digest = Digest.parse(message.digest)
    return Version(message.full_name, message.number, digest, manifest, manifest.created)


def alias_message(state: AliasState) -> pb.AliasState:
    """What an alias holds."""
    return pb.AliasState(
        version=state.version,
        digest=state.digest,
        generation=state.generation,
        targets=[pb.AliasState.Target(version=t.version, digest=t.digest, weight=t.weight) for t in state.targets],
    )


def alias_of(message: pb.AliasState) -> AliasState:
    """What an alias holds, out of a message."""
    targets = tuple(Target(t.version, Digest.parse(t.digest), t.weight) for t in message.targets)
    return AliasState(message.version, Digest.parse(message.digest), message.generation, targets)


def event_message(event: Event) -> pb.Event:
    """One line of the journal."""
    return pb.Event(
        seq=event.seq, kind=event.kind, full_name=event.full_name, alias=event.alias, version=event.version,
        digest=event.digest, time=event.time, actor=event.actor, before=_held_message(event.before),
        after=_held_message(event.after), note=event.note, batch=event.batch,
    )  # fmt: skip


def event_of(message: pb.Event) -> Event:
    """One line of the journal, out of a message; a kind of a newer release is kept as it is."""
    return Event(
        message.seq, cast(EventKind, message.kind), message.full_name,
        message.alias if message.HasField("alias") else None,
        message.version, Digest.parse(message.digest), message.time,
        message.actor if message.HasField("actor") else None,
        _held_of(message.before) if message.HasField("before") else None,
        _held_of(message.after) if message.HasField("after") else None,
        message.note if message.HasField("note") else None,
        message.batch,
    )  # fmt: skip


def lease_message(lease: Lease) -> pb.LeaseResponse:
    """Who keeps a version."""
    return pb.LeaseResponse(
        full_name=lease.full_name, version=lease.version, holder=lease.holder, expires=lease.expires
    )


def lease_of(message: pb.LeaseResponse) -> Lease:
    """Who keeps a version, out of a message."""
    expires = message.expires if message.HasField("expires") else None
    return Lease(message.full_name, message.version, message.holder, expires)


def problem_of(message: pb.CheckPart.Problem) -> Problem:
    """What is wrong with a version, out of a message."""
    file = message.file if message.HasField("file") else None
    return Problem(message.version, file, message.reason, message.message)


def base_message(base: BaseIdentity) -> pb.BaseIdentity:
    """A base's names and fingerprint."""
    return pb.BaseIdentity(
        name=base.name, revision=base.revision, fingerprint=base.fingerprint, quantization=base.quantization
    )


def base_of(message: pb.BaseIdentity) -> BaseIdentity:
    """A base's names and fingerprint, out of a message."""
    keys = ("name", "revision", "fingerprint", "quantization")
    return BaseIdentity(**{key: getattr(message, key) if message.HasField(key) else None for key in keys})


def query_message(query: Query) -> pb.SearchRequest:
    """Which versions."""
    return pb.SearchRequest(
        pattern=query.pattern, base=query.base, tag=query.tag, metrics=test_messages(query.metrics),
        newest=query.newest, after_name=query.after[0], after_number=query.after[1], limit=query.limit,
    )  # fmt: skip


def query_of(message: pb.SearchRequest) -> Query:
    """Which versions, out of a message; raises QueryInvalid."""
    return Query(
        message.pattern if message.HasField("pattern") else None,
        message.base if message.HasField("base") else None,
        message.tag if message.HasField("tag") else None,
        tests_of(message.metrics),
        message.newest,
        (message.after_name, message.after_number),
        message.limit,
    )


def test_messages(tests: Iterable[MetricTest]) -> list[pb.SearchRequest.MetricTest]:
    """Conditions on metrics."""
    return [pb.SearchRequest.MetricTest(name=test.name, compare=test.compare, bound=test.bound) for test in tests]


def tests_of(messages: Iterable[pb.SearchRequest.MetricTest]) -> tuple[MetricTest, ...]:
    """Conditions on metrics, out of messages; raises QueryInvalid."""
    found = []
    for message in messages:
        if not METRIC_NAME.fullmatch(message.name) or message.compare not in COMPARE:
            raise QueryInvalid(f"{message.name[:80]!a} {message.compare[:8]!a} is no condition on a metric")
        found.append(MetricTest(message.name, message.compare, parse_bound(repr(message.bound))))
    return tuple(found)


def gate_request(ref: str, alias: str, gate: Gate, scores: Scores | None) -> pb.PromoteRequest:
    """A promotion's conditions."""
    slack = pb.PromoteRequest.Slack
    return pb.PromoteRequest(
        ref=ref,
        alias=alias,
        require=test_messages(gate.require),
        no_lower=[slack(metric=name, slack=value) for name, value in gate.no_lower.items()],
        no_higher=[slack(metric=name, slack=value) for name, value in gate.no_higher.items()],
        scores=_scores_message(scores) if scores is not None else None,
    )


def gate_of(message: pb.PromoteRequest) -> Gate:
    """A promotion's conditions, out of a message; raises QueryInvalid."""
    return Gate(tests_of(message.require), _slacks(message.no_lower), _slacks(message.no_higher))


def scores_of(message: pb.PromoteRequest) -> Scores | None:
    """What the caller measured, out of a message; raises QueryInvalid."""
    if not message.HasField("scores"):
        return None
    sent = message.scores
    for scores in (sent.candidate, sent.current):
        for name, value in scores.items():
            if not METRIC_NAME.fullmatch(name) or not math.isfinite(value):
                raise QueryInvalid(f"{name[:80]!a} is no measured number")
    if len(sent.source) > MAX_SOURCE_CHARS or not sent.source.isprintable():
        raise QueryInvalid(f"where scores come from is a line of at most {MAX_SOURCE_CHARS} characters")
    digest = Digest.parse(sent.current_digest) if sent.HasField("current_digest") else None
    return Scores(dict(sent.candidate), dict(sent.current), digest, sent.source)


def _scores_message(scores: Scores) -> pb.PromoteRequest.Scores:
    return pb.PromoteRequest.Scores(
        candidate=scores.candidate, current=scores.current, current_digest=scores.current_digest, source=scores.source
    )


def _slacks(messages: Iterable[pb.PromoteRequest.Slack]) -> dict[str, float]:
    found = {}
    for message in messages:
        if not METRIC_NAME.fullmatch(message.metric) or not 0 <= message.slack < float("inf"):
            raise QueryInvalid(f"{message.metric[:80]!a} needs a slack, a number from 0 up")
        found[message.metric] = message.slack
    return found


def _held_message(held: Held | None) -> pb.Event.Held | None:
    if held is None:
        return None
    return pb.Event.Held(targets=[pb.AliasState.Target(version=number, weight=weight) for number, weight in held])


def _held_of(message: pb.Event.Held) -> Held:
    return tuple((target.version, target.weight) for target in message.targets)
