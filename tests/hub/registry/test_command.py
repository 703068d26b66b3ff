"""The commands, as people run them: server, login, push and pull with TLS, drain."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hub.cli_registry import _same
from hub.errors import HubUnavailable
from hub.hub import Hub
from hub.registry.server import RegistryConfig, RegistryServer
from hub.remote.remote_hub import RemoteHub
from tests.hub.making import write_adapter

HUB = [sys.executable, "-c", "from hub.cli import main; main()"]


def hub(*arguments: str, stdin: str = "", expect: int = 0) -> str:
    done = subprocess.run([*HUB, *arguments], input=stdin, capture_output=True, text=True, timeout=50)
    assert done.returncode == expect, done.stderr
    return done.stdout + (done.stderr if expect else "")


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A test authority, ca.pem, and a certificate of its for localhost: server.pem, server.key."""
    at = tmp_path / "certificates"
    at.mkdir()
    ec = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req", "-x509", *ec, "-keyout", f"{at}/ca.key", "-out", f"{at}/ca.pem", "-days", "2", "-subj", "/CN=test ca"
    )
    openssl("req", *ec, "-keyout", f"{at}/server.key", "-out", f"{at}/server.csr", "-subj", "/CN=localhost")
    (at / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    openssl(
        "x509", "-req", "-in", f"{at}/server.csr", "-CA", f"{at}/ca.pem", "-CAkey", f"{at}/ca.key", "-CAcreateserial",
        "-days", "2", "-extfile", f"{at}/san", "-out", f"{at}/server.pem",
    )  # fmt: skip
    return at


@contextmanager
def registry(*arguments: str, stderr: int | None = None) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    process = subprocess.Popen(
        [*HUB, "registry", "--listen", "127.0.0.1:0", *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready "), line
        yield process, dict(word.split("=", 1) for word in line.split()[1:])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_server_login_push_pull_and_drain(tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = hub("token", "create", "ada", "--grant", "*:admin").strip()
    pair = ("--tls-cert", str(certificates / "server.pem"), "--tls-key", str(certificates / "server.key"))
    with registry(*pair, "--metrics-port", "0") as (process, addresses):
        url = f"{addresses['hub']}?ca={certificates / 'ca.pem'}"
        assert "UNAUTHENTICATED" in hub("list", "--hub", url, expect=1)
        assert "UNAUTHENTICATED" in hub("login", url, stdin="lpt_wrong\n", expect=1)
        assert hub("login", url, stdin=f"{secret}\n").endswith("as ada\n")
        hub("push", str(write_adapter(tmp_path / "a")), "team/x", "--hub", url)
        hub("tag", "team/x@1", "prod", "--hub", url)
        hub("pull", "team/x:prod", str(tmp_path / "out"), "--hub", url)
        assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
            tmp_path / "a" / "adapter_model.safetensors"
        ).read_bytes()
        who = json.loads(hub("whoami", "--hub", url, "--json"))
        assert (who["subject"], who["grants"]) == ("ada", ["*:admin"])
        events = json.loads(hub("log", "--hub", url, "--json"))
        assert [event["actor"] for event in events] == ["ada"] * 3
        assert "prod" in hub("watch", "team/x:prod", "--since", "0", "--count", "1", "--hub", url)
        made = json.loads(hub("token", "create", "ci", "--grant", "team:read", "--hub", url, "--json"))
        assert "revoked" in hub("token", "revoke", made["id"], "--hub", url)
        assert made["secret"] not in hub("token", "list", "--json")
        page = urllib.request.urlopen(addresses["metrics"]).read().decode()
        assert 'loraplex_registry_calls_total{method="Publish",reason="OK"} 1.0' in page
        assert 'reason="UNAUTHENTICATED"' in page
        monkeypatch.setenv("LORAPLEX_HUB_TOKEN", secret)
        with pytest.raises(HubUnavailable), RemoteHub.open(addresses["hub"]) as without_ca:
            without_ca.resolve("team/x")
        with pytest.raises(HubUnavailable), RemoteHub.open(addresses["hub"].replace("grpcs", "grpc")) as in_clear:
            in_clear.resolve("team/x")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_server_without_tokens_stays_on_this_machine(tmp_path: Path) -> None:
    refused = hub("registry", "--without-tokens", "--listen", "0.0.0.0:0", expect=1)
    assert "CREDENTIALS_UNSAFE" in refused
    assert "HUB_UNAVAILABLE" in hub("registry", "--hub", "grpc://127.0.0.1:1", expect=1)
    assert "HUB_UNAVAILABLE" in hub("whoami", expect=1)


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1", "::1:50052", "localhost:http"])
def test_an_address_to_listen_on_that_is_none_is_named(address: str) -> None:
    assert f"'--listen': '{address}' is no address: write host:port" in hub("registry", "--listen", address, expect=2)


def test_a_token_that_cannot_be_sent_is_refused_before_it_is() -> None:
    refused = hub("login", "grpc://127.0.0.1:1", stdin="lpt_wröng\n", expect=1)
    assert refused == (
        "error: what was given has a character that no token has, '\\xf6': was it copied whole, and alone? "
        "(UNAUTHENTICATED)\n"
    )


def test_a_new_hub_is_told_of_and_its_first_token_goes_there(tmp_path: Path) -> None:
    there = str(tmp_path / "a hub")
    with registry("--hub", there, stderr=subprocess.PIPE) as (process, _):
        process.terminate()
        said = process.communicate(timeout=30)[1]
    assert f"made a new hub at {there}\n" in said
    command = re.search(r"`hub (token create .*)`", said)
    assert command is not None
    hub(*shlex.split(command[1]))
    assert "admin" in hub("token", "list", "--hub", there)
    with registry("--hub", there, stderr=subprocess.PIPE) as (process, _):
        process.terminate()
        assert "made" not in process.communicate(timeout=30)[1]


def test_a_database_password_is_not_repeated() -> None:
    assert _same("postgresql://hub:secret@db/hub?blobs=/srv/blobs") == " --hub URL"


def test_health_says_when_it_drains_and_watches_end(store: Hub, tmp_path: Path) -> None:
    import threading

    server = RegistryServer(store, None, RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")).start()
    store.push(write_adapter(tmp_path / "a"), "x")
    with grpc.insecure_channel(server.address) as channel, RemoteHub.open(f"grpc://{server.address}") as client:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "loraplex.v1.Registry"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        watch = client.watch(0, threading.Event())
        assert next(watch).kind == "push"
        ending = threading.Thread(target=server.stop, args=(20.0,))
        ending.start()
        with pytest.raises(HubUnavailable, match=r"ended the watch|cannot be reached"):
            for _ in watch:
                pass
        ending.join(10)
        assert not ending.is_alive(), "an open watch held up the end"


def test_a_taken_port_is_told(store: Hub, server: RegistryServer, tmp_path: Path) -> None:
    with pytest.raises(HubUnavailable, match="taken"):
        RegistryServer(store, None, RegistryConfig(listen=server.address, uploads=tmp_path / "uploads"))
