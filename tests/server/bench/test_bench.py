"""`hub bench` against a small real gRPC server whose answers are scripted."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from click.testing import CliRunner

from protos.loraplex.v1 import inference_pb2, inference_pb2_grpc
from server.bench import Measurement, Percentiles, Sample, lines
from server.bench_cli import bench


class Scripted(inference_pb2_grpc.InferenceServicer):
    """Answers with the wanted number of tokens, two a message; the adapter "broken" is unknown."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running = self.most_running = 0
        self.asked: list[str] = []

    def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateChunk]:
        refs = [selection.ref for selection in request.adapters]
        with self.lock:
            self.asked += refs or ["base"]
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        try:
            if refs == ["broken"]:
                context.set_trailing_metadata((("loraplex-reason", "ADAPTER_NOT_FOUND"),))
                context.abort(grpc.StatusCode.NOT_FOUND, "there is no adapter 'broken'")
            assert request.ignore_eos
            yield inference_pb2.GenerateChunk(request_id="r")
            left = request.max_new_tokens
            while left:
                count = min(2, left)
                left -= count
                yield inference_pb2.GenerateChunk(text="x" * count, token_ids=[1] * count)
            yield inference_pb2.GenerateChunk(finish_reason=inference_pb2.FINISH_REASON_LENGTH)
        finally:
            with self.lock:
                self.running -= 1


@pytest.fixture
def server() -> Iterator[tuple[str, Scripted]]:
    servicer = Scripted()
    grpc_server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
    inference_pb2_grpc.add_InferenceServicer_to_server(servicer, grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    yield f"127.0.0.1:{port}", servicer
    grpc_server.stop(0).wait()


def test_requests_go_round_the_adapters_and_all_tokens_count(server: tuple[str, Scripted]) -> None:
    address, servicer = server
    arguments = ["--adapter", "base", "--adapter", "team/a", "--adapter", "broken", "--max-new-tokens", "5"]

    result = CliRunner().invoke(
        bench,
        ["--server", address, *arguments, "--requests", "12", "--concurrency", "3", "--json"],
        standalone_mode=False,
    )

    assert result.return_value == 0, result.output
    data = json.loads(result.stdout)
    assert sorted(servicer.asked) == ["base"] * 4 + ["broken"] * 4 + ["team/a"] * 4
    assert servicer.most_running <= 3
    assert data["answered"] == 8
    assert {each["adapter"]: (each["requests"], each["failed"], each["tokens"]) for each in data["adapters"]} == {
        "base": (4, 0, 20),
        "team/a": (4, 0, 20),
        "broken": (0, 4, 0),
    }
    assert data["tokens_per_second"] == pytest.approx(40 / data["seconds"])
    assert data["adapters"][0]["first_token"]["p50"] > 0
    failure = {
        "adapter": "broken",
        "reason": "ADAPTER_NOT_FOUND",
        "count": 4,
        "message": "there is no adapter 'broken'",
    }
    assert data["failures"] == [failure]


def test_the_table_names_every_adapter_and_every_failure(server: tuple[str, Scripted]) -> None:
    arguments = ["--server", server[0], "--adapter", "team/a", "--adapter", "broken", "--requests", "4"]

    result = CliRunner().invoke(bench, arguments, standalone_mode=False)

    assert "team/a" in result.stdout
    assert "tokens/s" in result.stdout
    assert "2 failed with ADAPTER_NOT_FOUND: there is no adapter 'broken'" in result.stderr


def test_the_environment_names_a_server_too(server: tuple[str, Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLEX_SERVER", server[0])
    result = CliRunner().invoke(bench, ["--requests", "1"], standalone_mode=False)
    assert result.return_value == 0, result.output


def test_nothing_answered_is_a_failure() -> None:
    result = CliRunner().invoke(bench, ["--server", "127.0.0.1:1", "--requests", "2"], standalone_mode=False)

    assert result.return_value == 1
    assert "2 failed with UNAVAILABLE: no server answers at 127.0.0.1:1" in result.stderr


def test_percentiles_by_nearest_rank() -> None:
    assert Percentiles.of([]) is None
    assert Percentiles.of([7.0]) == Percentiles(7.0, 7.0, 7.0)
    assert Percentiles.of([float(n) for n in range(100, 0, -1)]) == Percentiles(51.0, 96.0, 100.0)


def test_lines_keep_adapters_apart() -> None:
    samples = [Sample("a", 0.1, 1.0, 3, (0.2, 0.4)), Sample("b", 0.5, 1.0, 1, ())]

    by_adapter = lines(Measurement(2.0, samples, {("b", "QUEUE_FULL"): 2}), ["a", "b", "a"])

    assert [(line.adapter, line.requests, line.failed, line.tokens) for line in by_adapter] == [
        ("a", 1, 0, 3),
        ("b", 1, 2, 1),
    ]
    assert by_adapter[1].inter_token is None
