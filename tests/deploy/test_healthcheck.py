"""The container's health check tells a serving server from a starting, a draining and an absent one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

SCRIPT = Path(__file__).parents[2] / "deploy" / "healthcheck.py"


@pytest.fixture
def server() -> Iterator[tuple[str, health.HealthServicer]]:
    servicer = health.HealthServicer()
    grpc_server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, grpc_server)
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    yield f"127.0.0.1:{port}", servicer
    grpc_server.stop(0).wait()


def check(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout.strip()


def test_serving_and_draining(server: tuple[str, health.HealthServicer]) -> None:
    address, servicer = server
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    assert check(address) == (0, "SERVING")

    servicer.enter_graceful_shutdown()
    assert check(address) == (1, "NOT_SERVING")


def test_an_unknown_service_is_not_healthy(server: tuple[str, health.HealthServicer]) -> None:
    assert check(server[0], "loraplex.v1.Nothing") == (1, "NOT_FOUND")


def test_no_server_is_not_healthy() -> None:
    code, printed = check("127.0.0.1:1")
    assert code == 1
    assert printed in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
