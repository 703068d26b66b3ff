"""Several processes at once over each engine: pushes, compare-and-swaps and sweeps with no grace."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub.hub import Hub
from tests.hub.conftest import MakeUrl
from tests.hub.making import lora_tensors, write_adapter
from tests.hub.racing import race


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
