"""The servicer's calls about evaluations."""

# ruff: noqa: N802  # methods are called as the calls of the proto

from __future__ import annotations

from collections.abc import Iterator

from hub.errors import BlobCorrupt, EvaluationRefused
from hub.evaluation import Evaluation
from hub.refs import Digest
from hub.registry.access import Access, Context
from hub.registry.parts import in_parts
from protos.loraplex.v1 import registry_pb2 as pb


class EvaluationCalls(Access):
    """AddEvaluation, ListEvaluations."""

    def AddEvaluation(self, request: pb.AddEvaluationRequest, context: Context) -> pb.AddEvaluationResponse:
        """See `Hub.add_evaluation`; for who may push versions of this adapter. When and by whom is the server's say."""
        caller = self._caller(context)
        version = self._readable(caller, Digest.parse(request.digest))
        caller.require("push", version.full_name)
        try:
            found = Evaluation.parse(request.record.json)
        except BlobCorrupt as error:
            raise EvaluationRefused(f"what was sent as an evaluation is none: {error}") from error
        if found.digest != version.digest:
            raise EvaluationRefused(f"the evaluation is of {found.digest}, and {version.text} is another version")
        kept = self._acting(caller, context).add_evaluation(found)
        return pb.AddEvaluationResponse(record=pb.EvaluationRecord(json=kept.encode()))

    def ListEvaluations(self, request: pb.ListEvaluationsRequest, context: Context) -> Iterator[pb.EvaluationsPart]:
        """See `Hub.evaluations`; what the caller may not read is not found."""
        version = self._readable(self._caller(context), Digest.parse(request.digest))
        records = (pb.EvaluationRecord(json=each.encode()) for each in self._hub.evaluations(version.digest))
        for part in in_parts(records):
            yield pb.EvaluationsPart(records=part)
