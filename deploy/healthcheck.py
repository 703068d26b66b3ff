"""Exit 0 when the server at ADDRESS says SERVING by grpc.health.v1, 1 otherwise: for container health checks.

python healthcheck.py [ADDRESS] [SERVICE]     (default: 127.0.0.1:50051, the server as a whole)
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_SECONDS = 3.0


def status(address: str, service: str = "") -> str:
    """The health status of `service` ("" is the whole server), or the gRPC status when nobody answers."""
    with grpc.insecure_channel(address) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_SECONDS)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


def main(arguments: list[str]) -> int:
    """Print the status and return the exit code."""
    found = status(*(arguments or ["127.0.0.1:50051"]))
    print(found)
    return 0 if found == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
