"""Several processes at once over each engine: pushes, compare-and-swaps and sweeps with no grace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hub.hub import Hub
from tests.hub.conftest import MakeUrl
from tests.hub.making import lora_tensors, write_adapter

WORKER = """
import json, sys
from hub.errors import HubError
from hub.hub import Hub

url, verb, *rest = sys.argv[1:]
with Hub.open(url) as hub:
    print("ready", flush=True)
    sys.stdin.readline()
    for argument in rest:
        try:
            if verb == "push":
                result = hub.push(argument, "team/x")
                print(json.dumps({"number": result.version.number, "digest": result.version.digest}), flush=True)
            elif verb == "churn":  # push, let go of it, push it again: as hostile to a sweep as can be
                number = hub.push(argument, "team/y:mine").version.number
                hub.untag("team/y", "mine")
                try:
                    hub.remove(f"team/y@{number}")
                except HubError:
                    pass  # :latest holds it
                print(json.dumps({"churned": number}), flush=True)
            elif verb == "sweep":
                swept = hub.sweep(retention_seconds=0, grace_seconds=0)
                print(json.dumps({"blobs": swept.blobs}), flush=True)
            elif verb == "watch":
                import threading
                from itertools import islice
                seqs = [event.seq for event in islice(hub.watch(0, threading.Event(), 0.01), int(argument))]
                print(json.dumps({"seqs": seqs}), flush=True)
            else:
                version, expect = argument.split(":")
                hub.tag(f"team/x@{version}", "prod", expect=int(expect))
                print(json.dumps({"moved_to": int(version)}), flush=True)
        except HubError as error:
            print(json.dumps({"reason": error.reason, "message": str(error)}), flush=True)
"""


def race(url: str, argument_lists: list[list[str]]) -> list[list[dict[str, Any]]]:
    """Run one worker process a list, all let go at the same moment; what each printed."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, url, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for arguments in argument_lists
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        outputs = []
        for worker in workers:
            out, _ = worker.communicate(timeout=80)
            assert worker.returncode == 0
            outputs.append([json.loads(line) for line in out.splitlines()])
        return outputs
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


@pytest.mark.timeout(120)
def test_a_sweep_with_no_grace_never_takes_what_a_push_needs(make_url: MakeUrl, tmp_path: Path) -> None:
    card = "the same in every adapter"
    for seed in range(16):
        (write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)) / "README.md").write_text(card)
    pushes = [["push", *(str(tmp_path / f"a{seed}") for seed in range(start, 12, 2))] for start in range(2)]
    churn = ["churn", *(str(tmp_path / f"a{seed}") for seed in (12, 13, 12, 14, 13, 15, 12))]
    results = race(make_url(), [*pushes, churn, ["sweep"] + ["-"] * 40])
    # A push that loses five rounds to sweeps in a row says so; it publishes nothing then.
    refused = [line for line in results[0] + results[1] if "reason" in line]
    assert {line["reason"] for line in refused} <= {"BLOBS_SWEPT"}, refused
    numbers = sorted(line["number"] for line in results[0] + results[1] if "number" in line)
    assert numbers == list(range(1, 13 - len(refused)))
    with Hub.open(make_url()) as hub:
        assert hub.verify() == []
        assert hub.fsck() == []
        assert [version.number for version in hub.versions("team/x")] == numbers
        hub.sweep(retention_seconds=0, grace_seconds=0)
        assert hub.verify() == hub.fsck() == []


@pytest.mark.timeout(120)
def test_a_watcher_in_another_process_misses_no_event_of_many_writers(make_url: MakeUrl, tmp_path: Path) -> None:
    for seed in range(12):
        write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed))
    pushes = [["push", *(str(tmp_path / f"a{seed}") for seed in range(start, 12, 3))] for start in range(3)]
    results = race(make_url(), [*pushes, ["watch", "24"]])
    assert results[3] == [{"seqs": list(range(1, 25))}]
    assert sorted(line["number"] for lines in results[:3] for line in lines) == list(range(1, 13))
    with Hub.open(make_url()) as hub:
        assert hub.fsck() == []


def test_of_racing_swaps_from_one_state_exactly_one_wins(make_url: MakeUrl, tmp_path: Path) -> None:
    with Hub.open(make_url()) as hub:
        for seed in range(4):
            hub.push(write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)), "team/x")
        hub.tag("team/x@1", "prod")
    flat = [line for lines in race(make_url(), [["tag", f"{version}:1"] for version in (2, 3, 4)]) for line in lines]
    winners = [line["moved_to"] for line in flat if "moved_to" in line]
    assert len(winners) == 1
    assert [line["reason"] for line in flat if "reason" in line] == ["ALIAS_MOVED"] * 2
    with Hub.open(make_url()) as hub:
        assert hub.aliases("team/x")["prod"].version == winners[0]
