"""Whose share of the server a call uses, over a real gRPC connection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
from click.testing import CliRunner

from protos.loraplex.v1 import inference_pb2, inference_pb2_grpc
from server.api.parse import MAX_TENANT_CHARS, tenant_of
from server.cli import serve
from server.errors import InvalidRequest
from tests.server.api.fakes import QUIET, FakeEngine, FakeHub, RunningServer

ASKED = inference_pb2.GenerateRequest(text="x", max_new_tokens=1)


@pytest.fixture
def told_apart(engine: FakeEngine, fake_hub: FakeHub) -> Iterator[RunningServer]:
    running = RunningServer(engine, fake_hub, replace(QUIET, tenant_header="x-tenant"))
    running.serve()
    yield running
    running.close()


def test_the_key_names_the_tenant(told_apart: RunningServer, engine: FakeEngine) -> None:
    with grpc.insecure_channel(told_apart.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        stub.Generate(ASKED, metadata=[("x-tenant", "blue"), ("other", "red")])
        list(stub.GenerateStream(ASKED, metadata=[("x-tenant", "red")]))
        stub.Generate(ASKED)
        several = inference_pb2.GenerateRequest(text="x", max_new_tokens=1, n=2)
        stub.Generate(several, metadata=[("x-tenant", "blue")])
    assert [request.tenant for request in engine.submitted] == ["blue", "red", "", "blue", "blue"]


def test_a_name_that_is_none_is_refused(told_apart: RunningServer, engine: FakeEngine) -> None:
    with grpc.insecure_channel(told_apart.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for metadata in ([("x-tenant", "blue"), ("x-tenant", "red")], [("x-tenant", "a" * (MAX_TENANT_CHARS + 1))]):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Generate(ASKED, metadata=metadata)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "x-tenant" in refused.value.details()
    assert not engine.submitted


def test_without_the_option_all_callers_are_one(server: RunningServer, engine: FakeEngine) -> None:
    with grpc.insecure_channel(server.address) as channel:
        inference_pb2_grpc.InferenceStub(channel).Generate(ASKED, metadata=[("x-tenant", "blue")])
    assert [request.tenant for request in engine.submitted] == [""]


@pytest.mark.parametrize("value", ["", b"blue", "bl\nue", "grün"])
def test_names_are_printable(value: str | bytes) -> None:
    with pytest.raises(InvalidRequest, match="1 to 128 printable ASCII characters"):
        tenant_of([("x-tenant", value)], "x-tenant")


@pytest.mark.parametrize("key", ["X-Tenant", "x tenant", "tenant-bin", "grpc-tenant", ""])
def test_keys_that_grpc_would_not_send_are_wrong_usage(key: str) -> None:
    result = CliRunner().invoke(serve, ["--tenant-header", key])
    assert result.exit_code == 2
    assert "is no metadata key" in result.output
