"""The hub's errors ⇄ gRPC statuses, in one place for both ends; the inference server adds its own and overrides few.

An answer that is an error carries google.rpc.ErrorInfo {reason, domain "loraplex"} in its status details, and the
reason once more as the trailing metadata `loraplex-reason`, for clients without these messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import grpc
from google.rpc import error_details_pb2, status_pb2

from hub import errors

DOMAIN: Final = "loraplex"
REASON_KEY: Final = "loraplex-reason"
DETAILS_KEY: Final = "grpc-status-details-bin"
INTERNAL_REASON: Final = "INTERNAL"
DRAINING_REASON: Final = "DRAINING"
MAX_MESSAGE_CHARS: Final = 1000  # messages travel in metadata, which is bounded

# The closest class of an error's ancestry decides.
STATUSES: Final[Mapping[type[Exception], grpc.StatusCode]] = {
    errors.RefInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    errors.QueryInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    errors.GateMalformed: grpc.StatusCode.INVALID_ARGUMENT,
    errors.GrantInvalid: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UploadRefused: grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AliasMoved: grpc.StatusCode.ABORTED,
    errors.BlobsSwept: grpc.StatusCode.ABORTED,
    errors.UploadLost: grpc.StatusCode.ABORTED,
    errors.VersionHeld: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NotRestorable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NothingToRollBack: grpc.StatusCode.FAILED_PRECONDITION,
    errors.GateRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ProfileMalformed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.HubReadOnly: grpc.StatusCode.FAILED_PRECONDITION,
    errors.BaseError: grpc.StatusCode.FAILED_PRECONDITION,
    errors.AdapterRejected: grpc.StatusCode.FAILED_PRECONDITION,
    errors.BlobCorrupt: grpc.StatusCode.DATA_LOSS,
    errors.SignatureMissing: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SignatureUntrusted: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SignatureInvalid: grpc.StatusCode.FAILED_PRECONDITION,
    errors.BundleRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.EvaluationRefused: grpc.StatusCode.INVALID_ARGUMENT,
    errors.EvaluationsUnsupported: grpc.StatusCode.UNIMPLEMENTED,
    errors.VersionClash: grpc.StatusCode.ALREADY_EXISTS,
    errors.HubUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
    errors.ServerBusy: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.HubError: grpc.StatusCode.INTERNAL,
}


def answer_for(
    error: Exception, statuses: Mapping[type[Exception], grpc.StatusCode] = STATUSES
) -> tuple[grpc.StatusCode, str, str]:
    """(status, message, reason) that a caller gets for `error`; of what `statuses` has no class: "internal error".

    All classes in `statuses` have a `reason`.
    """
    for ancestor in type(error).__mro__:
        if (status := statuses.get(ancestor)) is not None:
            message = error.public if isinstance(error, errors.HubUnavailable) else str(error)
            if len(message) > MAX_MESSAGE_CHARS:
                message = message[: MAX_MESSAGE_CHARS - 1] + "…"
            return status, message, error.reason  # type: ignore[attr-defined]
    return grpc.StatusCode.INTERNAL, "internal error", INTERNAL_REASON


def trailing(status: grpc.StatusCode, message: str, reason: str) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of an answer that is an error."""
    details = status_pb2.Status(code=status.value[0], message=message)
    details.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN))
    return (REASON_KEY, reason), (DETAILS_KEY, details.SerializeToString())


def reason_of(error: grpc.RpcError) -> str | None:
    """The hub's reason in an answer; None where no hub's server gave it."""
    sent: Any = error.trailing_metadata() if isinstance(error, grpc.Call) else ()
    for key, value in sent or ():
        if key == REASON_KEY:
            return str(value)
    return None


def error_of(error: grpc.RpcError) -> errors.HubError:
    """The hub's error that an answer stands for; HubUnavailable where the server was not reached."""
    reason = reason_of(error)
    code, details = (error.code(), error.details() or "") if isinstance(error, grpc.Call) else (None, str(error))
    kind = _BY_REASON.get(reason) if reason is not None else None
    if kind is not None:
        return kind(details)
    if code in _AWAY:
        return errors.HubUnavailable("the hub's server cannot be reached", _first_line(details))
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.HubUnavailable("there is no hub at this address, or its release is older than this one")
    failed = errors.HubError(f"the hub's server failed: {_first_line(details)}")
    if reason is not None:
        failed.reason = reason
    return failed


def is_away(error: grpc.RpcError) -> bool:
    """Whether no answer came, or that the server drains or lacks its database: trying again may help."""
    return isinstance(error, grpc.Call) and error.code() in _AWAY and reason_of(error) in _AWAY_REASONS


def is_unknown(error: grpc.RpcError) -> bool:
    """Whether what answered has no such call."""
    return (
        isinstance(error, grpc.Call)
        and error.code() is grpc.StatusCode.UNIMPLEMENTED
        and reason_of(error) not in _BY_REASON
    )


_AWAY: Final = (
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN,
)  # fmt: skip

_AWAY_REASONS: Final = (None, DRAINING_REASON, errors.HubUnavailable.reason)


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:300]


def _classes(root: type[errors.HubError]) -> Iterator[tuple[str, Any]]:
    yield root.reason, root
    for child in root.__subclasses__():
        yield from _classes(child)


_BY_REASON: Final[Mapping[str, type[errors.HubError]]] = dict(_classes(errors.HubError))
