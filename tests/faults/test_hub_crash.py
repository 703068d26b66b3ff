"""SIGKILL at every step of every write: nothing acknowledged is lost, nothing half-written is visible."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hub.hub import Hub
from tests.hub.making import lora_tensors, write_adapter

Case = dict[str, Any]


@pytest.fixture
def directories(tmp_path: Path) -> list[str]:
    return [str(write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed))) for seed in range(5)]


def live_and_die(root: Path, cases: list[Case]) -> list[dict[str, Any]]:
    """What became of each case; its hub is at root/<position>."""
    program = Path(__file__).with_name("dying_hub.py")
    done = subprocess.run(
        [sys.executable, str(program), str(root), json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=55,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def at_every_step(root: Path, case: Case) -> tuple[list[str], list[dict[str, Any]]]:
    """The case run once in peace, for its steps, then once for each step, dying just before it."""
    (whole,) = live_and_die(root / "whole", [{**case, "die_at": None}])
    assert not whole["killed"]
    assert whole["acknowledged"] == len(case["writes"])
    steps = whole["steps"]
    outcomes = live_and_die(root / "dying", [{**case, "die_at": number} for number in range(len(steps))])
    assert all(outcome["killed"] for outcome in outcomes)
    assert [len(outcome["steps"]) for outcome in outcomes] == list(range(len(steps)))
    return steps, outcomes


def check_whole(hub: Hub) -> None:
    """Every version is complete, every alias holds one, the journal has no gap and tells the same story."""
    assert hub.verify() == []
    # A process that died after its commit leaves the journal behind; whoever writes next brings it up.
    assert {problem.reason for problem in hub.fsck()} <= {"JOURNAL_BEHIND"}
    versions = hub.versions()
    events = hub.events(0)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    pushed = [event.version for event in events if event.kind == "push"]
    assert pushed == [version.number for version in versions] == list(range(1, len(versions) + 1))
    told = {event.alias: event.version for event in events if event.kind == "tag"}
    assert told == {alias: state.version for alias, state in hub.aliases("team/x").items()}


def test_push_killed_at_every_step(tmp_path: Path, directories: list[str]) -> None:
    first, second = directories[:2]
    case = {"prepare": [["push", first, "prod"]], "writes": [["push", second, "prod"]]}
    steps, outcomes = at_every_step(tmp_path, case)
    assert {"blob:create", "blob:write", "blob:sync", "blob:link", "blob:sync-directory"} <= set(steps)
    assert {"catalog:begin", "catalog:version", "catalog:event", "catalog:alias", "catalog:commit"} <= set(steps)
    for number, step in enumerate(steps):
        with Hub.open(str(tmp_path / "dying" / str(number))) as hub:
            check_whole(hub)
            # All or nothing: only a process that died after the commit left its version.
            held = {alias: state.version for alias, state in hub.aliases("team/x").items()}
            expected = 2 if number >= steps.index("catalog:committed") else 1
            assert held == {"latest": expected, "prod": expected}, step
            again = hub.push(second, "team/x", aliases=["prod"])
            assert (again.version.number, again.created) == (2, expected == 1), step
            check_whole(hub)
            assert hub.fsck() == [], step
    assert not any(outcome["acknowledged"] for outcome in outcomes)


def test_tag_killed_at_every_step(tmp_path: Path, directories: list[str]) -> None:
    case = {
        "prepare": [["push", directories[0], "prod"], ["push", directories[1]]],
        "writes": [["tag", "team/x@2", "prod"]],
    }
    steps, _ = at_every_step(tmp_path, case)
    assert steps == [
        "catalog:begin", "catalog:alias", "catalog:event", "catalog:commit", "catalog:committed", "journal:write",
        "journal:link", "journal:done",
    ]  # fmt: skip
    for number, step in enumerate(steps):
        with Hub.open(str(tmp_path / "dying" / str(number))) as hub:
            check_whole(hub)
            moved = number >= steps.index("catalog:committed")
            assert hub.aliases("team/x")["prod"].version == (2 if moved else 1), step
            hub.tag("team/x@2", "prod")
            assert hub.aliases("team/x")["prod"].version == 2
            check_whole(hub)
            assert hub.fsck() == [], step


def test_acknowledged_pushes_survive_whenever_the_process_dies(tmp_path: Path, directories: list[str]) -> None:
    writes = [["push", directory, "prod"] for directory in directories]
    dice = random.Random(20)
    cases = [{"prepare": [], "writes": writes, "die_at": dice.randrange(150)} for _ in range(15)]
    outcomes = live_and_die(tmp_path, cases)
    assert any(outcome["killed"] and outcome["acknowledged"] for outcome in outcomes)
    for number, outcome in enumerate(outcomes):
        with Hub.open(str(tmp_path / str(number))) as hub:
            assert len(hub.versions()) - outcome["acknowledged"] in (0, 1)  # 1: died between commit and answer
            for directory in directories:
                hub.push(directory, "team/x")
            check_whole(hub)
            assert len(hub.versions()) == len(directories)


def test_removal_killed_at_every_step(tmp_path: Path, directories: list[str]) -> None:
    case = {"prepare": [["push", directories[0]], ["push", directories[1]]], "writes": [["rm", "team/x@1"]]}
    steps, _ = at_every_step(tmp_path, case)
    for number in range(len(steps)):
        with Hub.open(str(tmp_path / "dying" / str(number))) as hub:
            removed = number >= steps.index("catalog:committed")
            assert [version.number for version in hub.versions()] == ([2] if removed else [1, 2])
            hub.push(directories[2], "team/x")
            assert hub.verify() == hub.fsck() == []


def test_a_sweep_killed_at_every_step(tmp_path: Path, directories: list[str]) -> None:
    case = {
        "prepare": [["push", directory] for directory in directories[:3]] + [["rm", "team/x@1"], ["rm", "team/x@2"]],
        "writes": [["gc"]],
    }
    steps, _ = at_every_step(tmp_path, case)
    assert steps.count("blob:delete") == 4  # two weights, two manifests; the config is shared
    for number in range(len(steps)):
        with Hub.open(str(tmp_path / "dying" / str(number))) as hub:
            assert hub.verify() == []
            assert {problem.reason for problem in hub.fsck()} <= {"JOURNAL_BEHIND"}
            assert [version.number for version in hub.versions()] == [3]
            if number < steps.index("catalog:committed"):
                assert hub.restore("team/x@1").number == 1
                hub.remove("team/x@1")
            hub.sweep(retention_seconds=0, grace_seconds=0)
            assert hub.verify() == hub.fsck() == []
            assert len(list(hub._blobs.digests())) == 3
            hub.pull("team/x@3", tmp_path / f"out-{number}")
            assert hub.push(directories[0], "team/x").version.number == 4
