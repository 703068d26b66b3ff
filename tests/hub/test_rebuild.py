"""Making a catalog anew, over both catalog engines: from journal and manifests alone, and with a catalog that works."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from hub.errors import BlobCorrupt, HubNotFound, HubTooNew, HubUnavailable, NotRestorable
from hub.facts import Facts
from hub.hub import Hub
from hub.rebuild import rebuild
from hub.registry.grants import Grant
from hub.registry.tokens import TokenStore
from hub.search import Query
from hub.sqlite import cause
from tests.hub.conftest import MakeUrl
from tests.hub.test_upkeep import adapter, sweep, three


def everything(hub: Hub) -> tuple[object, ...]:
    return (
        [(version.text, version.digest, version.manifest) for version in hub.versions()],
        {name: hub.aliases(name) for name in {version.full_name for version in hub.versions()}},
        hub.events(),
        hub.leases(),
        hub.fsck(),
    )


def test_the_catalog_is_made_anew_from_the_journal_and_the_manifests(make_url: MakeUrl, tmp_path: Path) -> None:
    with Hub.open(make_url()) as hub:
        ada = hub.acting_as("ada")
        Facts(metrics={"f1": 0.9}).write(adapter(tmp_path, 1))
        ada.push(tmp_path / "adapter-1", "team/a:prod", creator="ada")
        ada.push(adapter(tmp_path, 2), "team/a", parents=["team/a@1"])
        ada.push(adapter(tmp_path, 3), "team/a")
        ada.push(adapter(tmp_path, 4), "team/a")
        ada.push(adapter(tmp_path, 1), "b")
        ada.split([("team/a@1", 90), ("team/a@4", 10)], "prod")
        ada.tag("team/a@2", "gone")
        ada.untag("team/a", "gone")
        ada.remove("team/a@2")
        sweep(hub)
        ada.remove("team/a@3")
        ada.lease("b@1", "audit")
        before = everything(hub)
        hub.sweep(grace_seconds=0)
    with Hub.open(make_url()) as hub:
        hub._catalog.replace(lambda writer: None)  # an empty catalog
    if "://" not in make_url():
        for path in (tmp_path / "hub").glob("catalog.sqlite*"):
            path.unlink()
    made = rebuild(make_url())
    assert (made.versions, made.aliases, made.lost) == (4, 3, ())
    with Hub.open(make_url()) as hub:
        assert everything(hub) == before
        assert hub.fsck() == hub.verify() == []
        assert hub.restore("team/a@3").number == 3
        assert hub.search(Query(base="tiny-base")).versions[0].text == "b@1"
        assert hub.push(adapter(tmp_path, 5), "team/a").version.number == 5
        assert hub.lineage("team/a@5").ancestors == ()
        assert hub.fsck() == []


def test_a_damaged_database_file_is_kept_and_replaced(tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        three(hub, tmp_path)
        before = hub.events()
    (tmp_path / "hub" / "catalog.sqlite").write_bytes(b"garbage" * 1000)
    made = rebuild(str(tmp_path / "hub"))
    assert made.kept_as is not None
    assert (tmp_path / "hub" / made.kept_as).read_bytes().startswith(b"garbage")
    with Hub.open(str(tmp_path / "hub")) as hub:
        assert hub.events() == before
        assert hub.fsck() == []


@pytest.mark.parametrize("newer", ["the format", "the tables"])
def test_a_hub_of_a_newer_release_is_not_touched(newer: str, tmp_path: Path) -> None:
    root = tmp_path / "hub"
    with Hub.open(str(root)) as hub:
        three(hub, tmp_path)
    if newer == "the format":
        (root / "FORMAT").write_text("loraplex hub 3\n")
    else:
        with closing(sqlite3.connect(root / "catalog.sqlite")) as database:
            database.execute("UPDATE alembic_version SET version_num = '9999'")
            database.commit()
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(HubTooNew, match="use a newer one"):
        rebuild(str(root))
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_damaged_mark_alone_costs_no_token(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    with Hub.open(str(root)) as hub:
        three(hub, tmp_path)
        TokenStore(hub.database).create("ada", [Grant.parse("*:admin")])
    (root / "FORMAT").write_text("")
    with pytest.raises(HubUnavailable, match="--rebuild"):
        Hub.open(str(root))
    assert not rebuild(str(root)).new_file
    with Hub.open(str(root)) as hub:
        assert hub.fsck() == []
        assert [token.subject for token in TokenStore(hub.database).list()] == ["ada"]


@pytest.mark.parametrize("works", [True, False])
def test_a_rebuild_that_fails_leaves_the_old_database(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "hub"
    with Hub.open(str(root)) as hub:
        three(hub, tmp_path)
    file = root / "catalog.sqlite"
    if not works:
        file.write_bytes(b"garbage" * 1000)
    old = file.read_bytes()

    def full(*_: object) -> object:
        if not works:
            file.write_bytes(b"half of it")
        raise HubUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("hub.location.make_anew", full)
        with pytest.raises(HubUnavailable, match="full"):
            rebuild(str(root))
    assert file.read_bytes() == old
    assert not list(root.glob("*.damaged-*"))


def test_the_log_of_a_lost_database_is_not_played_into_the_new_one(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    hub = Hub.open(str(root))
    three(hub, tmp_path)
    log = (root / "catalog.sqlite-wal").read_bytes()
    before = hub.events()
    hub.close()
    (root / "catalog.sqlite").unlink()
    (root / "catalog.sqlite-wal").write_bytes(log)
    made = rebuild(str(root))
    assert (made.kept_as, made.new_file) == ("", True)
    assert len(list(root.glob("catalog.sqlite.damaged-*-wal"))) == 1
    with Hub.open(str(root)) as hub:
        assert hub.events() == before
        assert hub.fsck() == []


def test_a_sound_database_is_kept_too(tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        three(hub, tmp_path)
        before = everything(hub)
        made = rebuild(str(tmp_path / "hub"))  # while a reader has it open
        assert everything(hub) == before
    assert made.kept_as is not None
    (tmp_path / "hub" / "catalog.sqlite").unlink()
    (tmp_path / "hub" / made.kept_as).rename(tmp_path / "hub" / "catalog.sqlite")
    with Hub.open(str(tmp_path / "hub")) as hub:
        assert everything(hub) == before


@pytest.mark.parametrize("damage", ["gone", pytest.param("flip", marks=pytest.mark.files_of_the_hub)])
def test_a_manifest_that_the_catalog_still_has_is_not_lost(
    local_hub: Hub, make_url: MakeUrl, tmp_path: Path, damage: str
) -> None:
    three(local_hub, tmp_path)
    before = everything(local_hub)
    digest = local_hub.resolve("x@3").digest
    if damage == "gone":
        local_hub._blobs.delete(digest)
    else:
        (stored,) = (tmp_path / "hub" / "blobs").rglob(digest.hex)
        data = stored.read_bytes()
        stored.chmod(0o644)
        stored.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    made = rebuild(make_url())
    assert (made.versions, made.aliases, made.lost) == (3, 1, ())
    assert everything(local_hub) == before
    assert local_hub.verify() == [], "and the blob is whole again"


def lose(hub: Hub, *refs: str) -> None:
    """Damage these versions' manifests wherever they are."""
    import sqlalchemy as sa

    from hub.transactions import writing

    for ref in refs:
        version = hub.resolve(ref)
        hub._blobs.delete(version.digest)
        with writing(hub.database) as connection:
            statement = sa.text("UPDATE versions SET manifest = '{}' WHERE digest = :digest")
            connection.execute(statement, {"digest": version.digest})


def test_what_is_lost_everywhere_is_told_once_and_leaves_a_sound_hub(
    local_hub: Hub, make_url: MakeUrl, tmp_path: Path
) -> None:
    three(local_hub, tmp_path)
    local_hub.split([("x@1", 1), ("x@3", 3)], "prod")
    local_hub.tag("x@2", "stable")
    local_hub.lease("x@3", "audit")
    lose(local_hub, "x@3")
    assert {problem.version for problem in local_hub.fsck()} == {"x@3"}
    made = rebuild(make_url())
    assert [problem.version for problem in made.lost] == ["x@3"]
    assert made.aliases == 2
    assert [version.number for version in local_hub.versions()] == [1, 2]
    aliases = local_hub.aliases("x")
    assert {name: [(t.version, t.weight) for t in state.targets] for name, state in aliases.items()} == {
        "prod": [(1, 1)], "stable": [(2, 1)],
    }  # fmt: skip
    assert [(event.kind, event.alias, event.note) for event in local_hub.events()[-3:]] == [
        ("untag", "latest", "lost"), ("tag", "prod", "lost"), ("purge", None, "lost"),
    ]  # fmt: skip
    assert local_hub.leases() == []
    assert local_hub.fsck() == local_hub.verify() == []
    sweep(local_hub)
    with pytest.raises(NotRestorable):
        local_hub.restore("x@3")
    assert local_hub.push(adapter(tmp_path, 3), "x").version.number == 4, "its number stays given"
    again = everything(local_hub)
    assert rebuild(make_url()).lost == ()
    assert everything(local_hub) == again


def damage_record(root: Path, number: int, damage: str) -> None:
    record = sorted((root / "journal").rglob("*.json"))[number]
    data = record.read_bytes()
    record.chmod(0o644)
    if damage == "gone":
        record.unlink()
    else:
        record.write_bytes(data[:-1] if damage == "cut" else data.replace(b'"number":2', b'"number":3', 1))


@pytest.mark.files_of_the_hub
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_journal_is_written_again_from_the_catalog(
    hub: Hub, make_url: MakeUrl, tmp_path: Path, damage: str
) -> None:
    three(hub, tmp_path)
    before = everything(hub)
    damage_record(tmp_path / "hub", 1, damage)
    assert [problem.reason for problem in hub.fsck()] == ["JOURNAL_DAMAGED"]
    assert rebuild(make_url()).lost == ()
    assert everything(hub) == before
    assert hub.push(adapter(tmp_path, 4), "x").version.number == 4


@pytest.mark.files_of_the_hub
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_journal_is_never_rebuilt_from_without_a_sound_catalog(
    hub: Hub, make_url: MakeUrl, tmp_path: Path, damage: str
) -> None:
    import sqlalchemy as sa

    from hub.transactions import writing

    three(hub, tmp_path)
    damage_record(tmp_path / "hub", 1, damage)
    with writing(hub.database) as connection:
        connection.execute(sa.text("UPDATE adapters SET next_number = 7"))
    with pytest.raises(BlobCorrupt):
        rebuild(make_url())
    assert hub.resolve("x").number == 3  # the catalog is as it was


def test_no_file_of_an_adapter_can_pass_for_a_version_in_a_rebuild(make_url: MakeUrl, tmp_path: Path) -> None:
    """A card that is a perfect manifest of somebody else's adapter is still only a card."""
    with Hub.open(make_url()) as hub:
        version = hub.push(adapter(tmp_path, 1), "prod/model").version
        forged = json.loads(version.manifest.canonical()) | {"creator": "mallory"}
        card = json.dumps(forged, separators=(",", ":"), sort_keys=True)
        hub.push(adapter(tmp_path, 2, card=card), "mallory/x")
    rebuild(make_url())
    with Hub.open(make_url()) as hub:
        assert [found.text for found in hub.versions()] == ["mallory/x@1", "prod/model@1"]
        assert hub.resolve("prod/model") == version


def test_rebuilding_nothing_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(HubNotFound):
        rebuild(str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    Hub.open(str(tmp_path / "hub")).close()
    with pytest.raises(HubUnavailable, match="no journal"):
        rebuild(str(tmp_path / "hub"))


def test_a_full_disk_is_named_as_one() -> None:
    """SQLite says "disk I/O error" where it cannot make the file of its shared memory."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = "SQLITE_IOERR_SHMSIZE"
    wrapped = sa.exc.OperationalError("SELECT 1", None, error)
    assert cause(error) == cause(wrapped) == "disk I/O error: its disk is full or failing"
