"""Entry points read by hand are those that the standard library finds."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from hub.commands import COMMANDS
from hub.entry_points import entry_points, load


def test_every_group_of_this_environment_is_read_as_the_library_reads_it() -> None:
    groups = {entry.group for package in importlib.metadata.distributions() for entry in package.entry_points}
    assert "hub.commands" in groups and len(groups) > 2
    for group in groups:
        assert entry_points(group) == {
            entry.name: entry.value.partition("[")[0].strip() for entry in importlib.metadata.entry_points(group=group)
        }, group


def test_the_first_on_the_path_wins_and_damaged_places_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, target in (("one", "a:b"), ("two", "c:d")):
        info = tmp_path / place / f"My_Plugin-{len(target)}.dist-info"
        info.mkdir(parents=True)
        (info / "entry_points.txt").write_text(f"[other]\nx = y:z\n\n[our.group]\n# told\nverb = {target} [extra]\n")
    (tmp_path / "two" / "empty-1.dist-info").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "nowhere"), str(tmp_path / "one"), str(tmp_path / "two")])
    assert entry_points("our.group") == {"verb": "a:b"}
    assert entry_points("no.group") == {}


def test_what_is_named_is_loaded() -> None:
    assert load("hub.commands:COMMANDS") is COMMANDS
    assert load("os.path") is __import__("os").path
    with pytest.raises(ImportError):
        load("no.such.module:x")
    with pytest.raises(AttributeError):
        load("hub.commands:NOTHING")


def test_help_needs_no_metadata() -> None:
    """What `hub --help` imports is what it costs."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from hub.cli import _tables; assert len(_tables()) == 3; print(*sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"importlib.metadata", "email", "sqlalchemy", "torch", "grpc"} & set(told.stdout.split())
