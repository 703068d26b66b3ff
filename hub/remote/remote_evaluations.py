"""Evaluations of a shared hub's versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hub.errors import BlobCorrupt, EvaluationsUnsupported
from hub.evaluation import Evaluation
from hub.refs import Digest
from hub.remote.connection import CallUnknown, Connection
from protos.loraplex.v1 import registry_pb2 as pb


class RemoteEvaluations:
    """The part of `hub.remote.remote_hub.RemoteHub` that is about evaluations."""

    _connection: Connection
    _actor: str | None

    def add_evaluation(self, found: Evaluation) -> Evaluation:
        """See `Hub.add_evaluation`; raises EvaluationsUnsupported where the server's release keeps none."""
        record = pb.EvaluationRecord(json=found.encode())
        request = pb.AddEvaluationRequest(digest=Digest.parse(found.digest), record=record)
        with _kept_by_the_server():
            answer = self._connection.call("AddEvaluation", request, self._actor)
        return _about(found.digest, answer.record)

    def evaluations(self, digest: Digest | str) -> list[Evaluation]:
        """See `Hub.evaluations`; raises EvaluationsUnsupported where the server's release keeps none."""
        wanted = Digest.parse(digest)
        with _kept_by_the_server():
            parts = self._connection.stream("ListEvaluations", pb.ListEvaluationsRequest(digest=wanted), self._actor)
            return [_about(wanted, record) for part in parts for record in part.records]


@contextmanager
def _kept_by_the_server() -> Iterator[None]:
    try:
        yield
    except CallUnknown as error:
        raise EvaluationsUnsupported(
            "the shared hub's server is of a release that keeps no evaluations: update it, or leave out --record"
        ) from error


def _about(digest: Digest, record: pb.EvaluationRecord) -> Evaluation:
    found = Evaluation.parse(record.json)
    if found.digest != digest:
        raise BlobCorrupt(f"the server answered an evaluation of {found.digest} when asked for {digest}")
    return found
