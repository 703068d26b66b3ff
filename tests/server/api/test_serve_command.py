"""What `hub serve` refuses at once, and what it must not import before it bounds the threads."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hub.opening import open_hub


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


def a_hub(tmp_path: Path) -> Path:
    """An empty hub."""
    open_hub(str(tmp_path / "hub")).close()
    return tmp_path / "hub"


@pytest.mark.parametrize("option", ["--listen", "--metrics-port"])
def test_a_taken_port_is_one_line(option: str, tmp_path: Path, base: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"--listen": "127.0.0.1:0", "--metrics-port": "0"}
        ports[option] = f"127.0.0.1:{port}" if option == "--listen" else str(port)
        arguments = [word for pair in ports.items() for word in pair]
        result = hub_serve("--base", str(base), "--hub", str(a_hub(tmp_path)), *arguments)
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
    "option",
    [
        ("--listen", "nowhere"),
        ("--kv-memory", "much"),
        ("--kv-memory", "512"),
        ("--quantize", "int3"),
        ("--feedback-window", "soon"),
    ],
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


def test_a_router_that_is_none_is_one_line_before_anything_is_loaded(tmp_path: Path, base: Path) -> None:
    result = hub_serve("--base", str(base), "--hub", str(tmp_path / "hub"), "--router", f"x={base}")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert f"there is no router.json in {base}: " in result.stderr and "ROUTER_INVALID" in result.stderr


def test_a_gpu_that_is_not_there_is_one_line_before_anything_is_bound(tmp_path: Path, base: Path) -> None:
    result = hub_serve("--base", str(base), "--hub", str(tmp_path / "hub"), "--device", "cuda:99")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "there is no device cuda:99 here" in result.stderr


def test_a_hub_that_is_not_there_is_said(tmp_path: Path, base: Path) -> None:
    hub = tmp_path / "hub"
    arguments = ("--base", str(base), "--hub", str(hub), "--listen", "192.0.2.1:1")  # no address of ours: it ends here
    first, *_ = hub_serve(*arguments).stderr.splitlines()
    assert first == f"warning: there is no hub at {hub}; `hub push` makes it"
    assert "warning" not in hub_serve(*arguments).stderr  # it was made


def test_torch_is_imported_by_nothing_but_the_engine() -> None:
    """OpenMP reads its environment when torch is loaded, so that has to come after `bound_openmp`."""
    modules = "server.cli, server.client_cli, server.api.serving, server.adapters.directory, hub.hub, hub.base"
    modules += ", server.router_files"
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=30).returncode == 0
