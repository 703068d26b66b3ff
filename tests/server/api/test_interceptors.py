"""The table from exceptions to statuses."""

import asyncio
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

import hub.errors
import server.errors
from hub.remote.status import MAX_MESSAGE_CHARS
from server.api.interceptors import (
    STATUSES,
    HubRefuses,
    Loading,
    MalformedMessage,
    StatusInterceptor,
    answer_for,
)

Code = grpc.StatusCode
ERRORS = [
    error
    for module in (hub.errors, server.errors)
    for _, error in inspect.getmembers(module, inspect.isclass)
    if issubclass(error, Exception) and error.__module__ == module.__name__
]


OWN_TOKEN = (hub.errors.Unauthenticated, hub.errors.Forbidden)


@pytest.mark.parametrize(
    "error",
    [each for each in ERRORS if each not in OWN_TOKEN],
    ids=lambda error: f"{error.__module__}.{error.__name__}",
)
def test_every_error_of_ours_keeps_its_reason_and_message(error: type[Exception]) -> None:
    _, message, reason = answer_for(error("what is wrong"))
    assert (message, reason) == ("what is wrong", error.reason)  # type: ignore[attr-defined]


def test_only_roots_and_our_own_failures_are_internal() -> None:
    internal = {error for error in ERRORS if answer_for(error("x"))[0] is Code.INTERNAL}
    assert {error for error in internal if error in STATUSES} >= {
        hub.errors.HubError,
        server.errors.ServerError,
        server.errors.NonFiniteLogits,
    }
    callers_fault = (server.errors.InvalidRequest, hub.errors.NotFound, hub.errors.AdapterRejected)
    assert not any(issubclass(error, callers_fault) for error in internal)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (server.errors.ContextExceeded, Code.INVALID_ARGUMENT),
        (server.errors.TensorUnbound, Code.FAILED_PRECONDITION),
        (server.errors.QueueFull, Code.RESOURCE_EXHAUSTED),
        (server.errors.RequestTooLarge, Code.FAILED_PRECONDITION),
        (server.errors.Draining, Code.UNAVAILABLE),
        (hub.errors.RefInvalid, Code.INVALID_ARGUMENT),
        (hub.errors.VersionNotFound, Code.NOT_FOUND),
        (hub.errors.BlobCorrupt, Code.DATA_LOSS),
        (hub.errors.HubUnavailable, Code.UNAVAILABLE),
        (hub.errors.ShapeMismatch, Code.FAILED_PRECONDITION),
    ],
)
def test_statuses(error: type[Exception], status: grpc.StatusCode) -> None:
    assert answer_for(error("x"))[0] is status


def test_foreign_exceptions_are_not_quoted() -> None:
    class Sneaky(ValueError):
        reason = "SNEAKY"

    assert answer_for(Sneaky("/etc/passwd")) == (Code.INTERNAL, "internal error", "INTERNAL")


@pytest.mark.parametrize("error", OWN_TOKEN)
def test_a_hub_that_refuses_the_servers_token_is_no_fault_of_the_callers(error: type[Exception]) -> None:
    status, message, reason = answer_for(error("the token caf49 of srv was revoked"))
    assert (status, reason) == (Code.FAILED_PRECONDITION, "HUB_REFUSES")
    assert "srv" not in message and "whoever runs the server" in message


def test_what_a_database_says_stays_with_the_server() -> None:
    _, message, _ = answer_for(hub.errors.HubUnavailable("the catalog cannot be used", "no host db.internal"))
    assert message == "the catalog cannot be used"


def test_messages_fit_into_metadata() -> None:
    _, message, _ = answer_for(server.errors.InvalidRequest("x" * 100_000))
    assert len(message) == MAX_MESSAGE_CHARS


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("method", "counts"),
    [
        ("/loraplex.v1.Inference/GenerateStream", True),
        ("/loraplex.v1.Adapters/Load", True),
        ("/grpc.health.v1.Health/Watch", False),
        ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", False),
    ],
)
def test_only_our_own_methods_calls_count_as_failed_when_their_client_goes(
    method: str, counts: bool, streams: bool
) -> None:
    counted: list[str] = []
    interceptor = StatusInterceptor(counted.append, lambda method: None)

    async def unary(request: Any, context: Any) -> None:
        raise asyncio.CancelledError

    async def stream(request: Any, context: Any) -> Any:
        yield "first"
        raise asyncio.CancelledError

    async def continuation(details: Any) -> Any:
        build: Any = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        return build(stream if streams else unary, request_deserializer=bytes)

    async def call() -> None:
        details: Any = SimpleNamespace(method=method)
        handler: Any = await interceptor.intercept_service(continuation, details)
        if streams:
            assert [message async for message in handler.unary_stream(b"", None)] == ["first"]
        else:
            await handler.unary_unary(b"", None)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(call())
    assert counted == (["CANCELLED"] if counts else [])


def test_the_guide_says_each_reasons_status() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "serve.md").read_text()
    table = guide.partition("| status | reasons |")[2].partition("\n\n")[0]
    told: dict[str, Code] = {}
    status = None
    for row in table.splitlines()[2:]:
        first, reasons = row.split("|")[1:3]
        status = Code[first.strip(" `")] if first.strip() else status
        assert status is not None
        told |= dict.fromkeys(re.findall("`([A-Z_]+)`", reasons), status)
    own = [*ERRORS, HubRefuses, Loading, MalformedMessage]
    true = {error.reason: answer_for(error("x"))[0] for error in own if error not in OWN_TOKEN}  # type: ignore[attr-defined]
    assert told.pop("INTERNAL") is answer_for(ValueError())[0]
    assert told == {reason: true[reason] for reason in told}
    # The rest answers no call that somebody waits for: the root, pins, the start, merging, exports.
    of_the_server = {error.reason for error in own if issubclass(error, server.errors.ServerError)}  # type: ignore[attr-defined]
    assert of_the_server - told.keys() == {
        "SERVER_ERROR", "ADAPTER_IN_USE", "CANCELLED", "BASE_UNAVAILABLE", "DETERMINISM_UNAVAILABLE",
        "ROUTER_INVALID", "ROUTER_MISMATCH", "ROUTER_UNAVAILABLE", "ARCHITECTURE_UNSUPPORTED", "MERGE_NOT_EQUIVALENT",
        "EXPORT_UNSUPPORTED", "EXPORT_NOT_EQUIVALENT", "ADDRESS_UNAVAILABLE", "FEEDBACK_DIRECTORY_UNUSABLE",
    }  # fmt: skip
