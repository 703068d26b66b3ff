"""Damaged and failing storage: damage is noticed and never handed out, a full disk loses nothing."""

from __future__ import annotations

import errno
import random
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hub.errors import BlobCorrupt, HubUnavailable
from hub.hub import Hub, Version
from hub.location import open_local
from tests.hub.making import lora_tensors, write_adapter


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "a", tensors=lora_tensors(seed=1))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub.open(str(tmp_path / "hub")) as opened:
        yield opened


def blob(tmp_path: Path, version: Version, name: str) -> Path:
    digest = version.digest if name == "manifest" else version.manifest.files[name].sha256
    path = tmp_path / "hub" / "blobs" / "sha256" / digest.hex[:2] / digest.hex
    path.chmod(0o644)
    return path


def test_every_flipped_bit_is_noticed_and_none_is_served(tmp_path: Path, hub: Hub, directory: Path) -> None:
    version = hub.push(directory, "x").version
    dice = random.Random(3)
    for name in version.manifest.files:
        path = blob(tmp_path, version, name)
        sound = path.read_bytes()
        for _ in range(150):
            position, bit = dice.randrange(len(sound)), dice.randrange(8)
            damaged = bytearray(sound)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(BlobCorrupt):
                hub.read_file(version, name)
            with pytest.raises(BlobCorrupt):
                hub.pull("x", tmp_path / "out")
            assert not (tmp_path / "out").exists()
        assert [(problem.version, problem.file, problem.reason) for problem in hub.verify()] == [
            ("x@1", name, "BLOB_CORRUPT")
        ]
        path.write_bytes(sound)
    assert hub.verify() == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


DAMAGE: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "manifest"])
def test_damage_is_told_without_a_path_and_mended_by_pushing_again(
    tmp_path: Path, hub: Hub, directory: Path, damage: str, name: str
) -> None:
    version = hub.push(directory, "x").version
    DAMAGE[damage](blob(tmp_path, version, name))
    (problem,) = hub.verify("x")
    assert (problem.file, problem.reason) == (name, "BLOB_CORRUPT")
    assert str(tmp_path) not in problem.message
    if name != "manifest":
        with pytest.raises(BlobCorrupt):
            hub.read_file(version, name)
    assert hub.push(directory, "x").version == version
    assert hub.verify() == []


def test_a_manifest_changed_in_the_catalog_is_not_believed(tmp_path: Path, hub: Hub, directory: Path) -> None:
    version = hub.push(directory, "x").version
    with sqlite3.connect(tmp_path / "hub" / "catalog.sqlite") as connection:
        connection.execute("UPDATE versions SET manifest = replace(manifest, '\"alpha\":8', '\"alpha\":9')")
    connection.close()
    with Hub.open(str(tmp_path / "hub")) as reopened:
        assert reopened.resolve("x") == version  # from the blob
        assert [problem.reason for problem in reopened.verify()] == ["BLOB_CORRUPT"]
    blob(tmp_path, version, "manifest").write_bytes(b"{}")
    with Hub.open(str(tmp_path / "hub")) as reopened, pytest.raises(BlobCorrupt):
        reopened.resolve("x")


def test_a_journal_with_a_gap_is_told(tmp_path: Path, hub: Hub, directory: Path) -> None:
    hub.push(directory, "x")
    with sqlite3.connect(tmp_path / "hub" / "catalog.sqlite") as connection:
        connection.execute("DELETE FROM events WHERE seq = 1")
    connection.close()
    assert {(problem.version, problem.reason) for problem in hub.verify()} == {("catalog", "CATALOG_DAMAGED")}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_a_disk_that_fails_at_any_write_loses_and_shows_nothing(tmp_path: Path, directory: Path, code: int) -> None:
    root = tmp_path / "hub"
    steps: list[str] = []
    with Hub(*open_local(tmp_path / "rehearsal", step=steps.append)) as hub:
        hub.push(directory, "x")
    blob_steps = [number for number, step in enumerate(steps) if step.startswith("blob:")]
    assert len(blob_steps) == 15  # three blobs, five steps each
    for failing in blob_steps:
        count = iter(range(10**6))

        def fail(name: str, failing: int = failing, count: Iterator[int] = count) -> None:
            if next(count) == failing:
                raise OSError(code, "injected")

        with Hub(*open_local(root, step=fail)) as hub:
            with pytest.raises(HubUnavailable) as caught:
                hub.push(directory, "x")
            assert str(tmp_path) not in str(caught.value)
            assert hub.versions() == []
            assert list((root / "blobs" / "staging").iterdir()) == []
    with Hub.open(str(root)) as hub:
        assert hub.push(directory, "x").created
        assert hub.verify() == []


def test_a_full_disk_under_the_catalog_rolls_back_and_later_works(tmp_path: Path, hub: Hub, directory: Path) -> None:
    hub.push(directory, "x")
    blobs, catalog = open_local(tmp_path / "hub")
    catalog._engine.dispose()  # so that the next connection is a new one
    limits = ["PRAGMA max_page_count=1"]  # SQLite raises it to the size the file has: not one page more
    big = write_adapter(tmp_path / "big", tensors=lora_tensors(seed=2))
    (big / "loraplex.json").write_text('{"recipe": {"notes": "' + "x" * 200_000 + '"}}')

    @sa.event.listens_for(catalog._engine, "connect")
    def fill(connection: sqlite3.Connection, record: Any) -> None:
        for limit in limits:
            connection.execute(limit)

    with Hub(blobs, catalog) as full:
        with pytest.raises(HubUnavailable, match="full"):
            full.push(big, "x")
        assert [version.number for version in full.versions()] == [1]
    limits.clear()
    assert hub.push(big, "x").version.number == 2
    assert hub.verify() == []


def test_a_hub_whose_catalog_is_no_database_says_so(tmp_path: Path) -> None:
    Hub.open(str(tmp_path / "hub")).close()
    (tmp_path / "hub" / "catalog.sqlite").write_bytes(b"garbage" * 1000)
    with pytest.raises(HubUnavailable, match="not a database") as caught, Hub.open(str(tmp_path / "hub")) as hub:
        hub.versions()
    assert str(tmp_path) not in str(caught.value)
