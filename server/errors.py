"""The server's error tree: one class a cause, each with a stable `reason` that clients may match on.

Messages are for callers: they name what the caller sent and the limit it broke, never a path of this machine.
`server/api/interceptors.py` holds the one table from these classes to gRPC statuses.
"""

from __future__ import annotations


class ServerError(Exception):
    """Base of everything the server raises on purpose."""

    reason = "SERVER_ERROR"


class InvalidRequest(ServerError):
    """A field of the request is outside what the message says it may hold."""

    reason = "INVALID_REQUEST"


class PromptEmpty(InvalidRequest):
    """The prompt has no tokens."""

    reason = "PROMPT_EMPTY"


class ContextExceeded(InvalidRequest):
    """prompt tokens + max_new_tokens do not fit the model's context."""

    reason = "CONTEXT_EXCEEDED"


class StructureInvalid(InvalidRequest):
    """The JSON schema, regex, grammar or choice cannot be kept to; the message says what is wrong with it."""

    reason = "STRUCTURE_INVALID"


class StructureFailed(InvalidRequest):
    """No token could follow in the asked structure, or finding out took too long; the message says which."""

    reason = "STRUCTURE_FAILED"


class RouterUnnamed(InvalidRequest):
    """The request asks for `auto`, and the server has several routers; the message names them."""

    reason = "ROUTER_UNNAMED"


class AdapterUnservable(ServerError):
    """The adapter is sound, but this server's base or settings cannot serve it; the message names what."""

    reason = "ADAPTER_UNSERVABLE"


class BaseMismatch(AdapterUnservable):
    """The adapter was made for another base model."""

    reason = "BASE_MISMATCH"


class RankTooLarge(AdapterUnservable):
    """A module's rank is above the server's cap."""

    reason = "RANK_TOO_LARGE"


class UnsupportedAdapter(AdapterUnservable):
    """The adapter uses a feature this server does not serve; the message names it."""

    reason = "ADAPTER_FEATURE_UNSUPPORTED"


class TensorUnbound(AdapterUnservable):
    """A tensor of the adapter belongs to no module of the base, or has the wrong shape."""

    reason = "ADAPTER_DOES_NOT_BIND"


class AdapterInUse(ServerError):
    """The adapter cannot change while requests use it."""

    reason = "ADAPTER_IN_USE"


class QueueFull(ServerError):
    """As many requests wait as the server may hold; try again later."""

    reason = "QUEUE_FULL"


class RequestTooLarge(ServerError):
    """The request alone needs more memory pages or adapter rows than the server has in all."""

    reason = "REQUEST_TOO_LARGE"


class NonFiniteLogits(ServerError):
    """The model's output for this request, or for its prompt, was NaN or infinite; its neighbours are not affected."""

    reason = "NON_FINITE_OUTPUT"


class Draining(ServerError):
    """The server is shutting down."""

    reason = "DRAINING"


class Cancelled(ServerError):
    """The caller went away."""

    reason = "CANCELLED"


class EngineFailed(ServerError):
    """A step of the engine failed for a reason of its own; the request may be sent again."""

    reason = "ENGINE_FAILED"


class BaseUnavailable(ServerError):
    """The base model cannot be loaded; the message says what to do."""

    reason = "BASE_UNAVAILABLE"


class DeterminismUnavailable(ServerError):
    """`--deterministic` cannot be promised for this model on this machine; the message says why."""

    reason = "DETERMINISM_UNAVAILABLE"


class RouterInvalid(ServerError):
    """A router's files do not say what a router is, or there is too little to fit one."""

    reason = "ROUTER_INVALID"


class RouterMismatch(ServerError):
    """A router was fitted for another base: its fingerprint, precision, width or layer is not this one's."""

    reason = "ROUTER_MISMATCH"


class RouterUnavailable(ServerError):
    """The base's hidden states cannot be read here, so no router can choose; the message says why."""

    reason = "ROUTER_UNAVAILABLE"


class RouterNotFound(ServerError):
    """The request asks for a router that this server was not started with; the message names those it has."""

    reason = "ROUTER_NOT_FOUND"


class UnsupportedArchitecture(ServerError):
    """The base model's architecture cannot be served; the message says why."""

    reason = "ARCHITECTURE_UNSUPPORTED"


class MergeNotEquivalent(ServerError):
    """A merged model does not answer as base + adapter does."""

    reason = "MERGE_NOT_EQUIVALENT"


class ExportUnsupported(ServerError):
    """A model or adapter has a feature that the format asked for cannot hold; the message names it."""

    reason = "EXPORT_UNSUPPORTED"


class ExportNotEquivalent(ServerError):
    """An exported file, read back, does not compute what was exported."""

    reason = "EXPORT_NOT_EQUIVALENT"


class AddressUnavailable(ServerError):
    """The server cannot listen where it was told to."""

    reason = "ADDRESS_UNAVAILABLE"


class FeedbackOff(ServerError):
    """The server keeps no marks of answers: it was not started with `--feedback`."""

    reason = "FEEDBACK_OFF"


class RequestNotFound(ServerError):
    """No request of this id was answered to this tenant, or too long ago; which of them is not said."""

    reason = "REQUEST_NOT_FOUND"


class PromptNotText(ServerError):
    """A request's token ids are not what any text is made of, so its answer cannot become an example."""

    reason = "PROMPT_NOT_TEXT"


class FeedbackFull(ServerError):
    """A tenant's marks take as many bytes as they may."""

    reason = "FEEDBACK_FULL"


class FeedbackNotStored(ServerError):
    """A mark could not be written to the disk; it may be sent again."""

    reason = "FEEDBACK_NOT_STORED"


class FeedbackDirectoryUnusable(ServerError):
    """The directory for marks cannot be written, or holds none that could be read."""

    reason = "FEEDBACK_DIRECTORY_UNUSABLE"
