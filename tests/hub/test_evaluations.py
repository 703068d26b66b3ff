"""Records of scores beside versions: kept, found again, about one version only, and no way round the hub's limits."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from hub.cli import group
from hub.errors import BlobCorrupt
from hub.evaluation import Evaluation
from hub.evaluations import Evaluations
from hub.hub import Hub
from hub.place import Place
from hub.versions import Version
from tests.hub.making import lora_tensors, write_adapter


@pytest.fixture
def versions(tmp_path: Path) -> tuple[Version, Version]:
    with Hub.open(str(tmp_path / "hub")) as hub:
        first = hub.push(write_adapter(tmp_path / "a"), "team/x").version
        second = hub.push(write_adapter(tmp_path / "b", tensors=lora_tensors(seed=1)), "team/x").version
    return first, second


def in_directory(tmp_path: Path) -> Evaluations:
    return Evaluations.at(Place.parse(str(tmp_path / "hub")))


def scored(version: Version, task: str = "sentiment", accuracy: float = 0.5) -> Evaluation:
    return Evaluation(
        version.text, version.digest, task, {"digest": "sha256:1", "examples": 9}, {"name": "t", "quantization": "nf4"},
        {"accuracy": accuracy}, {"accuracy": (accuracy - 0.1, accuracy + 0.1)}, by="somebody",
    )  # fmt: skip


def test_records_are_kept_in_order_and_the_newest_of_a_task_counts(
    tmp_path: Path, versions: tuple[Version, Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = versions
    kept = in_directory(tmp_path)
    assert kept.all_of(first) == [] and kept.recorded(first, None).candidate == {}
    now = [1_800_000_000.25]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for accuracy in (0.5, 0.7, 0.6):
        written = kept.add(first, scored(first, accuracy=accuracy))
        assert written.at == "2027-01-15T08:00:00Z" and replace(written, at="") == scored(first, accuracy=accuracy)
        now[0] += 0.000002
    now[0] += 1
    kept.add(first, scored(first, "own-label", 0.9))
    again = Evaluations.at(Place.parse(f"file://{tmp_path / 'hub'}"))
    assert [each.metrics["accuracy"] for each in again.all_of(first)] == [0.5, 0.7, 0.6, 0.9]
    assert again.recorded(first, None).candidate == {"sentiment.accuracy": 0.6, "own-label.accuracy": 0.9}
    assert again.all_of(second) == []


def test_a_record_is_the_file_that_it_always_was(
    tmp_path: Path, versions: tuple[Version, Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = versions
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.25)
    in_directory(tmp_path).add(first, scored(first))
    [file] = (tmp_path / "hub" / "evaluations" / first.digest.hex).iterdir()
    assert re.fullmatch(r"20270115T080000\.250000-[0-9a-f]{8}\.json", file.name)
    assert file.read_text() == (
        '{"at":"2027-01-15T08:00:00Z","base":{"name":"t","quantization":"nf4"},"by":"somebody",'
        '"data":{"digest":"sha256:1","examples":9},"digest":"' + first.digest + '",'
        '"intervals":{"accuracy":[0.4,0.6]},"metrics":{"accuracy":0.5},"schema":"loraplex.evaluation/1",'
        '"task":"sentiment","version":"team/x@1"}'
    )


def test_damaged_and_foreign_records_are_seen(tmp_path: Path, versions: tuple[Version, Version]) -> None:
    first, second = versions
    kept = in_directory(tmp_path)
    kept.add(first, scored(first))
    [file] = (tmp_path / "hub" / "evaluations" / first.digest.hex).iterdir()
    other = tmp_path / "hub" / "evaluations" / second.digest.hex
    other.mkdir()
    (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BlobCorrupt, match="another version"):
        kept.all_of(second)
    for text in (
        "",
        "{}",
        file.read_text().replace("evaluation/1", "evaluation/2"),
        '{"schema": "loraplex.evaluation/1"}',
    ):
        file.write_text(text)
        with pytest.raises(BlobCorrupt):
            kept.all_of(first)


def test_a_half_written_record_is_not_read(tmp_path: Path, versions: tuple[Version, Version]) -> None:
    first, _ = versions
    kept = in_directory(tmp_path)
    kept.add(first, scored(first))
    directory = tmp_path / "hub" / "evaluations" / first.digest.hex
    (directory / ".20270115T080000.000000-00000000.json").write_text("{")
    assert len(kept.all_of(first)) == 1


def test_show_shows_them(tmp_path: Path, versions: tuple[Version, Version]) -> None:
    first, _ = versions
    hub = str(tmp_path / "hub")
    in_directory(tmp_path).add(first, scored(first))
    shown = CliRunner().invoke(group, ["show", "team/x@1", "--hub", hub], catch_exceptions=False).output
    assert "evaluation: sentiment" in shown and "accuracy" in shown
    told = json.loads(CliRunner().invoke(group, ["show", "team/x@1", "--hub", hub, "--json"]).output)
    assert told["evaluations"][0]["metrics"] == {"accuracy": 0.5}
    assert (
        json.loads(CliRunner().invoke(group, ["show", "team/x@2", "--hub", hub, "--json"]).output)["evaluations"] == []
    )
    # A sweep of the hub, and its check, take no notice.
    with Hub.open(hub) as opened:
        assert opened.fsck() == [] and opened.verify() == []


def test_a_sweep_takes_the_records_of_versions_that_it_forgot(
    tmp_path: Path, versions: tuple[Version, Version]
) -> None:
    first, second = versions
    kept = in_directory(tmp_path)
    for version in versions:
        kept.add(version, scored(version))
    with Hub.open(str(tmp_path / "hub")) as hub:
        hub.remove(first.text)
        hub.sweep(grace_seconds=0)  # it can still be restored
        assert len(kept.all_of(first)) == 1
        would = hub.sweep(retention_seconds=0, grace_seconds=0, dry_run=True)
        assert len(kept.all_of(first)) == 1
        assert hub.sweep(retention_seconds=0, grace_seconds=0) == would
        assert would.bytes > sum(entry.bytes for entry in first.manifest.files.values() if entry.bytes > 4096)
    assert kept.digests() == [second.digest]
    assert kept.all_of(first) == [] and len(kept.all_of(second)) == 1


def test_fsck_reads_the_records(tmp_path: Path, versions: tuple[Version, Version]) -> None:
    first, second = versions
    kept = in_directory(tmp_path)
    with Hub.open(str(tmp_path / "hub")) as hub:
        kept.add(first, scored(first))
        assert hub.fsck() == []
        [file] = (tmp_path / "hub" / "evaluations" / first.digest.hex).iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[:-9])
        [problem] = hub.fsck()
        assert (problem.reason, problem.file) == ("BLOB_CORRUPT", f"evaluations/{first.digest.hex[:16]}…/{file.name}")
        file.write_bytes(whole)
        file.rename(tmp_path / "moved")
        kept.add(second, scored(second))
        (tmp_path / "moved").rename(tmp_path / "hub" / "evaluations" / second.digest.hex / file.name)
        assert [found.message for found in hub.fsck()] == [
            "an evaluation's record of team/x@1 is about another version"
        ]


def test_a_gate_asks_for_what_evaluations_recorded(tmp_path: Path, versions: tuple[Version, Version]) -> None:
    """By the verb: nothing recorded, too little, enough, and held to what the alias holds."""
    first, second = versions
    url = str(tmp_path / "hub")
    kept = in_directory(tmp_path)
    (tmp_path / "gate.toml").write_text(
        'require = ["sentiment.accuracy >= 0.6"]\nno_lower = {"sentiment.accuracy" = 0.01}'
    )

    def promoted(version: Version) -> tuple[int, str]:
        command = ["promote", version.text, "prod", "--gate", str(tmp_path / "gate.toml"), "--hub", url]
        done = CliRunner().invoke(group, command)
        return done.exit_code, done.output + str(done.exception or "")

    code, said = promoted(first)
    assert code == 1 and "sentiment.accuracy is not recorded" in said
    kept.add(first, scored(first, accuracy=0.5))
    code, said = promoted(first)
    assert code == 1 and "sentiment.accuracy 0.5 >= 0.6" in said
    kept.add(first, scored(first, accuracy=0.8))
    assert promoted(first)[0] == 0

    other = replace(scored(second, accuracy=0.9), data={"digest": "sha256:2", "examples": 9})
    kept.add(second, other)
    code, said = promoted(second)
    assert code == 1 and "of team/x@1 was measured by other questions or on another base" in said
    kept.add(first, replace(scored(first, accuracy=0.95), data=other.data))
    code, said = promoted(second)
    assert code == 1 and "sentiment.accuracy 0.9 >= 0.94 (team/x@1 has 0.95)" in said
    kept.add(second, scored(second, accuracy=0.795))
    code, said = promoted(second)
    assert code == 0 and "sentiment.accuracy 0.795 >= 0.79 (team/x@1 has 0.8)" in said
