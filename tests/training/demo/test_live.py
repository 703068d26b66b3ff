"""The demo's serving half against a real server on the tiny base: the pieces a reader of the demo relies on."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from hub.hub import Hub
from training.demo.live import Row, batch_table, metric, mixed_batch, move_alias, shortened
from training.demo.shell import Shell
from training.errors import DemoFailed

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def shell(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, make_adapter: Callable[..., Path]
) -> Iterator[Shell]:
    root = tmp_path_factory.mktemp("demo")
    with Hub.open(str(root / "hub")) as hub:
        for i in range(4):
            directory = make_adapter(tiny_base, root / f"a{i}", seed=i)
            hub.push(directory, f"team/a{i}", base=str(tiny_base), aliases=["prod"])
    yield Shell(Console(file=io.StringIO(), width=100), root / "hub")


@pytest.fixture(scope="module")
def served(shell: Shell, tiny_base: Path) -> Iterator[dict[str, str]]:
    with shell.serving("--base", str(tiny_base), "--quantize", "none", "--dtype", "float32", "--threads", "1") as at:
        yield at


def test_a_mixed_batch_fills_every_row_and_shares_a_step(shell: Shell, served: dict[str, str]) -> None:
    rows = [Row("base", HELLO, [])] + [Row(f"a{i}", HELLO, [(f"team/a{i}:prod", 1.0)]) for i in range(3)]
    rows.append(Row("two", HELLO, [("team/a0@1", 0.7), ("team/a1@1", 0.3)]))
    mixed_batch(shell.console, served["grpc"], rows, max_new_tokens=64)
    assert [row.versions for row in rows] == [
        "",
        "team/a0@1",
        "team/a1@1",
        "team/a2@1",
        "0.7 x team/a0@1 + 0.3 x team/a1@1",
    ]
    assert all(row.first_token is not None for row in rows)
    assert metric(served["metrics"], "loraplex_batch_adapters_max") >= 1
    with pytest.raises(DemoFailed, match="no such_metric"):
        metric(served["metrics"], "such_metric")
    assert batch_table(rows).row_count == 5


def test_the_running_stream_keeps_its_version(shell: Shell, served: dict[str, str], tmp_path: Path) -> None:
    def push_second() -> None:
        with Hub.open(str(shell.hub)) as hub:
            source = hub.pull("team/a1@1", tmp_path / "copy").text
            assert source == "team/a1@1"
            hub.push(tmp_path / "copy", "team/a3", aliases=["prod"])

    story = move_alias(served["grpc"], "team/a3:prod", HELLO, push_second)
    assert story.stream_versions == {"team/a3@1"}
    assert story.stream_tokens == 400
    assert story.after == "team/a3@2"


def test_a_verb_that_fails_ends_the_demo(shell: Shell) -> None:
    with pytest.raises(DemoFailed, match="ADAPTER_NOT_FOUND"):
        shell.ask("show", "team/nobody")
    with pytest.raises(DemoFailed, match="did not start"), shell.serving("--base", "/nowhere"):
        pass


def test_the_demo_deletes_only_what_it_made(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    ended = subprocess.run(
        [str(Path(sys.executable).with_name("hub")), "demo", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ,
        check=False,
    )
    assert ended.returncode == 2
    assert "not made by this demo" in ended.stderr
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(("text", "limit", "shown"), [("a\n b", 9, "a b"), ("abcdef", 4, "abc…")])
def test_shortened(text: str, limit: int, shown: str) -> None:
    assert shortened(text, limit) == shown
