"""The pins cover what is asked for, the make targets are listed, and the built package holds what runs."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return [
        Requirement(text) for text in [*PROJECT["dependencies"], *extras["train"], *extras["plots"], *extras["dev"]]
    ]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_direct_dependency_is_pinned_and_installed_as_pinned(requirement: Requirement) -> None:
    pinned = {canonical(name): pin for name, pin in PINS.items()}.get(canonical(requirement.name))

    assert pinned is not None, f"{requirement.name} is not in constraints.txt"
    assert requirement.specifier.contains(pinned)
    assert version(requirement.name).partition("+")[0] == pinned


def test_every_entry_point_of_ours_loads() -> None:
    for name in ("hub.commands", "hub.bases"):
        ours = [entry for entry in entry_points(group=name) if entry.dist and entry.dist.name == "loraplex"]
        assert ours, name
        for entry in ours:
            assert entry.load()


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, timeout=30)

    listed = set(re.findall(r"^  make (\w+)  +\S", done.stdout, flags=re.MULTILINE))
    assert listed >= {"venv", "demo", "check", "test", "serve", "protos", "docs", "clean", "help"}


def test_an_old_python_is_named_before_anything_is_installed(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.9" || exit 1\n', encoding="utf-8")
    old.chmod(0o755)

    done = subprocess.run(
        ["make", "venv", f"PYTHON={old}", f"VENV={tmp_path}/venv"], cwd=ROOT, capture_output=True, text=True, timeout=30
    )

    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "is Python 3.10.9" in done.stderr
    assert not (tmp_path / "venv").exists()
