"""Removal, restoring, sweeping, checking and rebuilding, over both catalog engines."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import pytest

from hub import sweep as sweeping
from hub.errors import (
    HubUnavailable,
    NotRestorable,
    RefInvalid,
    VersionHeld,
    VersionNotFound,
)
from hub.hub import Hub
from hub.rebuild import rebuild
from hub.replay import State
from hub.search import Query
from tests.hub.conftest import MakeUrl
from tests.hub.making import lora_tensors, write_adapter


def adapter(tmp_path: Path, seed: int, card: str | None = None) -> Path:
    directory = write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))
    if card is not None:
        (directory / "README.md").write_text(card)
    return directory


def three(hub: Hub, tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        hub.push(adapter(tmp_path, seed), "x")


def sweep(hub: Hub) -> tuple[tuple[str, ...], int]:
    swept = hub.sweep(retention_seconds=0, grace_seconds=0)
    return swept.purged, swept.blobs


def test_a_removed_version_is_found_by_nobody_until_it_is_restored(hub: Hub, tmp_path: Path) -> None:
    three(hub, tmp_path)
    version = hub.remove("x@2")
    for look in (
        lambda: hub.resolve("x@2"),
        lambda: hub.resolve(f"x@{version.digest}"),
        lambda: hub.get(version.digest),
        lambda: hub.pull("x@2", tmp_path / "out"),
        lambda: hub.tag("x@2", "prod"),
        lambda: hub.remove("x@2"),
        lambda: hub.lease("x@2", "me"),
    ):
        with pytest.raises(VersionNotFound, match="was removed"):
            look()
    assert [found.number for found in hub.versions()] == [1, 3]
    assert [found.number for found in hub.search(Query()).versions] == [1, 3]
    assert hub.verify() == hub.fsck() == []
    assert hub.restore(f"x@{version.digest}") == version
    assert hub.resolve("x@2") == version
    with pytest.raises(NotRestorable, match="not removed"):
        hub.restore("x@2")
    with pytest.raises(RefInvalid):
        hub.restore("x:latest")
    with pytest.raises(VersionNotFound):
        hub.restore("x@9")
    assert [event.kind for event in hub.events()][-2:] == ["rm", "restore"]


def test_what_an_alias_a_pin_or_a_lease_holds_stays(hub: Hub, tmp_path: Path) -> None:
    three(hub, tmp_path)
    hub.split([("x@1", 99), ("x@2", 1)], "prod")
    with pytest.raises(VersionHeld, match=":prod"):
        hub.remove("x@2")
    with pytest.raises(VersionHeld, match=":latest"):
        hub.remove("x")
    hub.untag("x", "prod")
    hub.lease("x@2", "audit")
    hub.lease("x@2", "server-1", 60)
    with pytest.raises(VersionHeld, match="a pin of audit, a lease of server-1"):
        hub.remove("x@2")
    assert [(lease.holder, lease.expires is None) for lease in hub.leases("x")] == [
        ("audit", True), ("server-1", False),
    ]  # fmt: skip
    hub.release("x@2", "audit")
    hub.release("x@2", "nobody")
    hub.lease("x@2", "server-1", -1)  # renewed to an end that is past
    assert hub.leases() == []
    hub.remove("x@2")
    assert [event.kind for event in hub.events() if event.kind in ("pin", "unpin")] == ["pin", "unpin"]
    assert hub.fsck() == []


def test_pushing_a_removed_version_again_brings_it_back(hub: Hub, tmp_path: Path) -> None:
    three(hub, tmp_path)
    hub.remove("x@1")
    result = hub.push(adapter(tmp_path, 1), "x")
    assert (result.version.number, result.created) == (1, False)
    assert "x@1 was removed; it is restored, and :latest is x@1 now" in result.warnings
    assert hub.resolve("x").number == 1
    assert [(event.kind, event.alias) for event in hub.events()][-2:] == [("restore", None), ("tag", "latest")]


def test_the_sweep_takes_what_nothing_needs_and_only_that(hub: Hub, tmp_path: Path) -> None:
    hub.push(adapter(tmp_path, 1, card="shared"), "x")
    hub.push(adapter(tmp_path, 2, card="shared"), "x")
    hub.push(adapter(tmp_path, 3, card="alone"), "x")
    hub.tag("x@1", "latest")
    hub.remove("x@2")
    hub.remove("x@3")
    foretold = hub.sweep(retention_seconds=0, grace_seconds=0, dry_run=True)
    assert hub.last_seq() == 9
    assert hub.fsck() == []
    swept = hub.sweep(retention_seconds=0, grace_seconds=0)
    assert swept == foretold
    assert swept.purged == ("x@2", "x@3")
    assert swept.blobs == 5  # two weights, two manifests, one card; config and the other card are x@1's too
    assert sweep(hub) == ((), 0)
    assert hub.verify() == hub.fsck() == []
    hub.pull("x@1", tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == "shared"
    with pytest.raises(NotRestorable, match="its bytes are gone"):
        hub.restore("x@2")
    with pytest.raises(VersionNotFound):
        hub.resolve("x@2")
    assert hub.push(tmp_path / "adapter-2", "x").version.number == 4  # a number is never given twice


def test_retention_and_grace_keep_what_is_young(local_hub: Hub, tmp_path: Path) -> None:
    three(local_hub, tmp_path)
    local_hub.remove("x@1")
    (local_hub._blobs.put(io.BytesIO(b"of a push that died")))
    assert local_hub.sweep().purged == ()
    swept = local_hub.sweep(retention_seconds=0)
    assert (swept.purged, swept.blobs) == (("x@1",), 0)
    assert local_hub.sweep(grace_seconds=0).blobs == 3  # x@1's weights and manifest, the orphan


@pytest.mark.files_of_the_hub
def test_leftovers_of_dead_pushes_go_when_they_are_old(hub: Hub, tmp_path: Path) -> None:
    three(hub, tmp_path)
    staging = tmp_path / "hub" / "blobs" / "staging"
    (staging / "young").write_bytes(b"x")
    (staging / "old").write_bytes(b"xx")
    os.utime(staging / "old", (time.time() - 7200,) * 2)
    swept = hub.sweep()
    assert (swept.leftovers, swept.bytes) == (1, 2)
    assert [path.name for path in staging.iterdir()] == ["young"]


def test_a_push_whose_bytes_are_swept_before_it_publishes_stores_them_again(
    local_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_hub.push(adapter(tmp_path, 1), "x")
    directory = adapter(tmp_path, 2)
    publish, swept = local_hub._catalog.publish, []

    def sweep_first(*arguments: object) -> object:
        if not swept:
            swept.append(local_hub.sweep(retention_seconds=0, grace_seconds=0).blobs)
        return publish(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(local_hub._catalog, "publish", sweep_first)
    assert local_hub.push(directory, "x").version.number == 2
    assert swept == [2]
    assert local_hub.verify() == local_hub.fsck() == []


def test_nothing_is_swept_by_a_catalog_that_lags_behind_the_journal(make_url: MakeUrl, tmp_path: Path) -> None:
    """One put back from a backup knows nothing of the versions since, whose bytes are there."""
    with Hub.open(make_url()) as hub:
        three(hub, tmp_path)
        _forget_after(hub, 2)
        with pytest.raises(HubUnavailable, match="fsck --rebuild"):
            hub.sweep(retention_seconds=0, grace_seconds=0)
        assert "CATALOG_DAMAGED" in {problem.reason for problem in hub.fsck()}
        with pytest.raises(HubUnavailable, match="another story"):
            hub.push(adapter(tmp_path, 4), "x")
    rebuild(make_url())
    with Hub.open(make_url()) as hub:
        assert [version.number for version in hub.versions()] == [1, 2, 3]
        assert hub.push(adapter(tmp_path, 4), "x").version.number == 4
        assert hub.fsck() == []


def _forget_after(hub: Hub, seq: int) -> None:
    """Take the catalog, and not the journal, back to event `seq` of a story of pushes."""
    import sqlalchemy as sa

    from hub.transactions import writing

    with writing(hub.database) as connection:
        for table in ("targets", "aliases", "files", "metrics", "versions"):
            late = "" if table in ("targets", "aliases") else " WHERE number > 1"
            connection.execute(sa.text(f"DELETE FROM {table}{late}"))
        connection.execute(sa.text(f"DELETE FROM events WHERE seq > {seq}"))
        connection.execute(sa.text("UPDATE adapters SET next_number = 2"))
        connection.execute(sa.text(f"INSERT INTO aliases VALUES ('x', 'latest', {seq})"))
        connection.execute(sa.text("INSERT INTO targets VALUES ('x', 'latest', 1, 1)"))


@pytest.mark.files_of_the_hub
def test_the_journal_is_brought_up_by_whoever_writes_next(hub: Hub, tmp_path: Path) -> None:
    three(hub, tmp_path)
    records = sorted((tmp_path / "hub" / "journal").rglob("*.json"))
    for record in records[1:]:  # as a process leaves it that dies between commit and journal
        record.unlink()
    assert [problem.reason for problem in hub.fsck()] == ["JOURNAL_BEHIND"]
    assert not hub.push(adapter(tmp_path, 3), "x").created
    assert sorted((tmp_path / "hub" / "journal").rglob("*.json")) == records
    assert hub.fsck() == []


def test_a_pull_that_a_sweep_overtakes_says_that_the_version_was_removed(
    local_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three(local_hub, tmp_path)
    version = local_hub.resolve("x@1")
    monkeypatch.setattr(local_hub, "resolve", lambda ref: version)
    local_hub.remove("x@1")
    sweep(local_hub)
    with pytest.raises(Exception, match="there is no version sha256"):
        local_hub.pull("x@1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_write_that_lasts_longer_than_a_second_tells_one_time(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by killing processes a thousand times: purged rows and their events differed by a second."""
    three(hub, tmp_path)
    seconds = iter(range(10**6))
    monkeypatch.setattr("hub.catalog_writer.now", lambda: f"2026-01-01T00:{next(seconds):04}Z")
    hub.remove("x@1")
    hub.remove("x@2")
    assert hub.fsck() == []
    sweep(hub)
    assert hub.fsck() == []


def test_a_damaged_file_that_two_versions_share_is_told_of_each(local_hub: Hub, tmp_path: Path) -> None:
    for seed in (1, 2):
        local_hub.push(adapter(tmp_path, seed, card="shared"), f"team/{'ab'[seed - 1]}")
    local_hub._blobs.delete(local_hub.resolve("team/a").manifest.files["README.md"].sha256)
    assert [(problem.version, problem.message) for problem in local_hub.verify()] == [
        (f"{name}@1", f"README.md of {name}@1 is missing from the hub's storage") for name in ("team/a", "team/b")
    ]


def test_defaults_are_those_the_guide_names() -> None:
    assert (sweeping.RETENTION_SECONDS, sweeping.GRACE_SECONDS) == (7 * 86400, 3600)
    assert State().last_seq == 0
