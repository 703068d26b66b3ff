"""What `hub serve` refuses at once, and what it must not import before it bounds the threads."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest


def hub_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from hub.cli import main; main()", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Enough of a base to be found; nothing here gets as far as loading it."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


@pytest.mark.parametrize("option", ["--listen", "--metrics-port"])
def test_a_taken_port_is_one_line(option: str, tmp_path: Path, base: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"--listen": "127.0.0.1:0", "--metrics-port": "0"}
        ports[option] = f"127.0.0.1:{port}" if option == "--listen" else str(port)
        arguments = [word for pair in ports.items() for word in pair]
        result = hub_serve("--base", str(base), "--hub", str(tmp_path / "hub"), *arguments)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: cannot ") and line.endswith("(ADDRESS_UNAVAILABLE)") and str(port) in line


def test_an_unknown_base_and_a_hub_that_cannot_be_opened_are_one_line(tmp_path: Path, base: Path) -> None:
    unknown = hub_serve("--base", "nosuch", "--hub", str(tmp_path / "hub"))
    assert (unknown.returncode, unknown.stdout, unknown.stderr.count("\n")) == (1, "", 1)
    assert "there is no base 'nosuch'" in unknown.stderr
    unopened = hub_serve("--base", str(base), "--hub", "gopher://somewhere")
    assert (unopened.returncode, unopened.stdout, unopened.stderr.count("\n")) == (1, "", 1)
    assert "HUB_UNAVAILABLE" in unopened.stderr


@pytest.mark.parametrize(
    "option", [("--listen", "nowhere"), ("--kv-memory", "much"), ("--quantize", "int3"), ("--feedback-window", "soon")]
)
def test_wrong_usage_is_2(option: tuple[str, str]) -> None:
    result = hub_serve(*option)
    assert result.returncode == 2
    assert option[1] in result.stderr


def test_a_feedback_directory_that_is_none_is_one_line_before_anything_is_loaded(tmp_path: Path, base: Path) -> None:
    below_a_file = base / "config.json" / "kept"
    result = hub_serve("--base", str(base), "--hub", str(tmp_path / "hub"), "--feedback", str(below_a_file))
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "FEEDBACK_DIRECTORY_UNUSABLE" in result.stderr


def test_torch_is_imported_by_nothing_but_the_engine() -> None:
    """OpenMP reads its environment when torch is loaded, so that has to come after `bound_openmp`."""
    modules = "server.cli, server.client_cli, server.api.serving, server.adapters.directory, hub.hub, hub.base"
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=30).returncode == 0
