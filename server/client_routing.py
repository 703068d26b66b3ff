"""How a server chose for a request with the adapter `auto`, as its answer says it."""

from __future__ import annotations

from dataclasses import dataclass

from protos.loraplex.v1 import inference_pb2


@dataclass(frozen=True)
class Routing:
    """How the server chose for a request with the adapter `auto`."""

    router: str
    chosen: str  # the reference, as the router has it; empty: none of them, the base answers
    nearest: str  # whose prompts this one is most like, chosen or not
    distance: float  # squared, in units of those prompts' own spread
    threshold: float  # beyond it the base answers


def chosen_by(message: inference_pb2.GenerateResponse) -> Routing | None:
    """What a message says of it; None where no router was asked."""
    if not message.HasField("routing"):
        return None
    return Routing(**{field: getattr(message.routing, field) for field in Routing.__dataclass_fields__})
