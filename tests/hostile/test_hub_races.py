"""Row 25: concurrent pushes of one version and moves of one alias, from several processes."""

from __future__ import annotations

from pathlib import Path

from hub.hub import Hub
from tests.hub.making import lora_tensors, write_adapter
from tests.hub.racing import race

SECONDS = 40  # of a worker


def test_row_25_the_same_bytes_from_four_processes_are_one_version(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "a")
    results = race(str(tmp_path / "hub"), [["push", str(directory)]] * 4, SECONDS)  # also races to make the hub
    flat = [result for lines in results for result in lines]
    assert {result["number"] for result in flat} == {1}
    assert len({result["digest"] for result in flat}) == 1
    assert sorted(result["created"] for result in flat) == [False, False, False, True]


def test_row_25_different_bytes_from_four_processes_all_get_numbers(tmp_path: Path) -> None:
    for seed in range(12):
        write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed))
    lists = [["push", *(str(tmp_path / f"a{seed}") for seed in range(start, 12, 4))] for start in range(4)]
    flat = [result for lines in race(str(tmp_path / "hub"), lists, SECONDS) for result in lines]
    assert sorted(result["number"] for result in flat) == list(range(1, 13))
    with Hub.open(str(tmp_path / "hub")) as hub:
        assert hub.verify() == []
        assert hub.resolve("team/x").number == 12
        assert [event.seq for event in hub.events(0)] == list(range(1, 25))


def test_row_25_of_racing_swaps_from_one_state_exactly_one_wins(tmp_path: Path) -> None:
    url = str(tmp_path / "hub")
    with Hub.open(url) as hub:
        for seed in range(5):
            hub.push(write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)), "team/x")
        hub.tag("team/x@1", "prod")
    results = race(url, [["tag", f"{version}:1"] for version in (2, 3, 4, 5)], SECONDS)
    flat = [result for lines in results for result in lines]
    winners = [result["moved_to"] for result in flat if "moved_to" in result]
    assert len(winners) == 1
    assert [result["reason"] for result in flat if "reason" in result] == ["ALIAS_MOVED"] * 3
    with Hub.open(url) as hub:
        assert hub.aliases("team/x")["prod"].version == winners[0]
