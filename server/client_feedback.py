"""What a caller says of an answer, as a message."""

from __future__ import annotations

from typing import Literal

from protos.loraplex.v1 import inference_pb2

Rating = Literal["good", "bad"]


def feedback_request(
    request_id: str, rating: Rating | None, correction: str | None, candidate: int, comment: str
) -> inference_pb2.FeedbackRequest:
    """The message of a call; raises ValueError for a rating that there is not."""
    ratings = {
        None: inference_pb2.RATING_UNSPECIFIED,
        "good": inference_pb2.RATING_GOOD,
        "bad": inference_pb2.RATING_BAD,
    }
    if rating not in ratings:
        raise ValueError(f"a rating is good or bad, not {rating!r}")
    return inference_pb2.FeedbackRequest(
        request_id=request_id, rating=ratings[rating], correction=correction, index=candidate, comment=comment
    )
