"""Ports, health, reflection, the metrics page, loading, draining."""

import asyncio
import contextlib
import socket
import urllib.request
from collections.abc import Iterator
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from server.adapters.directory import AdapterDirectory
from server.api.lifecycle import SERVICES
from server.api.serving import Outcome, Parts, serve
from server.client import Client, GenerationError
from server.config import ServerConfig
from server.errors import AddressUnavailable
from tests.server.api.fakes import QUIET, FakeEngine, FakeHub, RunningServer

NAMES = ("", "loraplex.v1.Inference", "loraplex.v1.Adapters")


@contextlib.contextmanager
def started(engine: FakeEngine, hub: FakeHub, config: ServerConfig = QUIET) -> Iterator[RunningServer]:
    running = RunningServer(engine, hub, config)
    try:
        yield running
    finally:
        running.close()


def health_of(address: str) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answers = [stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in NAMES]
    return [health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status) for answer in answers]


def test_loading_then_serving(engine: FakeEngine, fake_hub: FakeHub) -> None:
    with started(engine, fake_hub) as server, Client(server.address) as client:
        assert health_of(server.address) == ["NOT_SERVING"] * 3
        for call in (lambda: client.generate("x"), client.adapters, lambda: client.stream("x")):
            with pytest.raises(GenerationError) as refused:
                call()
            assert (refused.value.status, refused.value.reason) == ("UNAVAILABLE", "LOADING")
        server.serve()
        assert health_of(server.address) == ["SERVING"] * 3
        assert client.generate("x", max_new_tokens=1).text == "a"


def test_draining_lets_running_streams_end_and_refuses_new_calls(server: RunningServer, engine: FakeEngine) -> None:
    engine.gate.clear()
    with Client(server.address) as client, client.stream("x", max_new_tokens=3) as stream:
        assert engine.wait_running(1)
        drained = server.spawn(server.server.drain())
        server.run(_yield())  # the drain has begun
        assert health_of(server.address) == ["NOT_SERVING"] * 3
        with pytest.raises(GenerationError) as refused:
            client.generate("y")
        assert (refused.value.status, refused.value.reason) == ("UNAVAILABLE", "DRAINING")
        assert not drained.done()
        engine.gate.set()
        assert "".join(chunk.text for chunk in stream) == "abc"
        assert drained.result(5) is True


def test_what_outlasts_the_drain_ends_with_a_reason(engine: FakeEngine, fake_hub: FakeHub) -> None:
    engine.gate.clear()
    with started(engine, fake_hub, replace(QUIET, drain_seconds=0.05)) as server:
        server.serve()
        with Client(server.address) as client, client.stream("x") as stream:
            assert server.run(server.server.drain()) is False
            engine.close()
            with pytest.raises(GenerationError) as cut:
                list(stream)
            assert (cut.value.status, cut.value.reason) == ("UNAVAILABLE", "DRAINING")


def test_a_server_whose_engine_fails_ends(engine: FakeEngine, fake_hub: FakeHub) -> None:
    """Whoever started it sees that, and starts another."""
    told: list[str] = []

    def ready(line: str) -> None:
        told.append(line)
        engine.ended.set()

    parts = Parts(lambda: AdapterDirectory(fake_hub), lambda metrics: engine)  # type: ignore[arg-type,return-value]
    config = replace(QUIET, listen="127.0.0.1:0")
    assert asyncio.run(serve(config, parts, announce=ready, progress=told.append)) is Outcome.FAILED
    assert told[-2:] == ["the engine has failed: the reason is in the log; stopping", "stopped"]


async def _yield() -> None:
    """Let everything scheduled before run once."""


def test_reflection_lists_and_describes_the_services(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="loraplex.v1.Inference"),
        ]
        listed, described = stub.ServerReflectionInfo(iter(requests))
    names = {service.name for service in listed.list_services_response.service}
    assert names == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert described.file_descriptor_response.file_descriptor_proto


def test_an_unknown_method_is_unimplemented(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary("/loraplex.v1.Inference/Nothing")(b"")
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_taken_port_is_refused(server: RunningServer, fake_hub: FakeHub) -> None:
    from server.api.lifecycle import Server

    async def bind(config: ServerConfig) -> None:
        second = Server(config, server.metrics)
        try:
            await second.bind()
        finally:
            await second.stop()

    with pytest.raises(AddressUnavailable, match=server.address):
        server.run(bind(ServerConfig(listen=server.address, metrics_port=-1)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AddressUnavailable, match=f"metrics on 127.0.0.1:{port}"):
            server.run(bind(ServerConfig(listen="127.0.0.1:0", metrics_port=port)))


def test_the_metrics_page(engine: FakeEngine, fake_hub: FakeHub) -> None:
    with started(engine, fake_hub, ServerConfig(metrics_port=0)) as server, Client(server.address) as client:
        server.serve()
        client.load("team/a")
        with pytest.raises(GenerationError):
            client.generate("x", adapters="team/nobody")
        engine.gate.clear()
        with client.stream("x", adapters=["team/a:prod", "team/b"]):
            assert engine.wait_running(1)
            assert server.server.metrics_url is not None
            with urllib.request.urlopen(server.server.metrics_url) as page:
                text = page.read().decode()
    samples = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples[("loraplex_requests_running",)] == samples[("vllm:num_requests_running",)] == 1
    assert samples[("loraplex_requests_waiting",)] == samples[("vllm:num_requests_waiting",)] == 2
    assert samples[("loraplex_kv_cache_usage_ratio",)] == samples[("vllm:kv_cache_usage_perc",)] == 0.75
    assert samples[("loraplex_adapters_resident", ("tier", "device"))] == 1
    assert samples[("loraplex_errors_total", ("reason", "ADAPTER_NOT_FOUND"))] == 1
    (info,) = [key for key in samples if key[0] == "vllm:lora_requests_info"]
    assert dict(info[1:]) == {  # type: ignore[arg-type]
        "max_lora": "64",
        "running_lora_adapters": "team/a,team/b",
        "waiting_lora_adapters": "solo,team/b",
    }
    assert samples[info] > 1.7e9
