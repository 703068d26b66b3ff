"""The container files agree with each other, with the command line and with the source tree."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return content


def serve_options() -> set[str]:
    from hub.cli import group

    serve = group.get_command(click.Context(group), "serve")
    assert serve is not None
    return {name for parameter in serve.params for name in parameter.opts}


def dockerfile_command(text: str) -> list[str]:
    (command,) = re.findall(r"^CMD (\[.*\])$", text, flags=re.MULTILINE)
    words: list[str] = yaml.safe_load(command)
    return words


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_dockerfile_copies_what_exists_and_starts_what_the_command_line_has(name: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]

    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    for package in ("hub", "server", "training", "protos"):
        assert package in sources
    command = dockerfile_command(text)
    assert command[0] == "serve"
    assert {word for word in command if word.startswith("--")} <= serve_options()
    assert re.search(r"^USER \d+$", text, flags=re.MULTILINE), "runs as root"
    assert "healthcheck.py" in text


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images_have_the_compiler_that_native_steps_need_where_they_run(name: str) -> None:
    (packages,) = re.findall(
        r"apt-get install -y --no-install-recommends ([a-z0-9 -]+) &&",
        (DEPLOY / name).read_text(encoding="utf-8").rpartition("\nFROM ")[2],
    )

    assert {"gcc", "libc6-dev", "libgomp1"} <= set(packages.split())


def test_the_image_for_a_gpu_has_what_its_kernels_need() -> None:
    assert "pip install -c constraints.txt '.[gpu]'" in (DEPLOY / "Dockerfile.cuda").read_text(encoding="utf-8")


def test_compose_files_it_mounts_exist_and_its_flags_are_real(compose: dict[str, Any]) -> None:
    server, prometheus = compose["services"]["server"], compose["services"]["prometheus"]

    assert (DEPLOY / server["build"]["context"] / server["build"]["dockerfile"]).is_file()
    assert {word for word in server["command"] if word.startswith("--")} <= serve_options()
    for mount in prometheus["volumes"]:
        source = mount.split(":")[0]
        assert source in compose["volumes"] or (DEPLOY / source).exists(), source
    mounts = {mount["target"]: mount.get("read_only", False) for mount in server["volumes"] if isinstance(mount, dict)}
    assert mounts == {"/hub": False, "/hub/blobs": True}
    # A folder that Docker makes is root's, and the server is not root.
    made = [mount["bind"]["create_host_path"] for mount in server["volumes"] if isinstance(mount, dict)]
    assert made == [False, False]


def test_prometheus_scrapes_the_port_the_server_exposes(compose: dict[str, Any]) -> None:
    command = compose["services"]["server"]["command"]
    port = command[command.index("--metrics-port") + 1]
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))

    assert config["scrape_configs"][0]["static_configs"][0]["targets"] == [f"server:{port}"]


def test_the_container_is_given_longer_than_the_server_drains(compose: dict[str, Any]) -> None:
    server = compose["services"]["server"]
    drain = float(server["command"][server["command"].index("--drain-seconds") + 1])

    assert float(server["stop_grace_period"].removesuffix("s")) > drain


def test_scripts_are_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
