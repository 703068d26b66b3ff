"""One bit flipped anywhere in a hub's files: noticed, and never handed on. 10,000 with LORAPLEX_FAULTS=full."""

from __future__ import annotations

import json
import random
import re
import shutil
import sqlite3
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from hub.errors import BlobCorrupt, HubError, HubUnavailable
from hub.hub import Hub
from hub.rebuild import rebuild
from hub.search import MetricTest, Query
from tests.faults.full import FULL, times
from tests.hub.making import lora_tensors, write_adapter

FLIPS = times(10_000, 150)
CATALOG_FLIPS = times(2_000, 30)
QUERIES = [
    Query(metrics=(MetricTest.parse("f1>0.55"),)),
    Query(tag="prod"),
    Query(base="tiny-base", newest=True),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "hub"
    with Hub.open(str(root)) as hub:
        for seed in range(3):
            source = write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed))
            (source / "README.md").write_text(f"# adapter {seed}\n")
            (source / "loraplex.json").write_text(json.dumps({"metrics": {"f1": 0.5 + seed / 10}}))
            hub.push(source, "team/x", aliases=["prod"])
        hub.tag("team/x@2", "prod")
        hub.lease("team/x@1", "audit")
        hub.split([("team/x@2", 9), ("team/x@3", 1)], "canary")
    return root


def flipped(path: Path, dice: random.Random) -> bytes:
    """Flip one bit of a file in place; its sound bytes."""
    path.chmod(0o644)
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[dice.randrange(len(sound))] ^= 1 << dice.randrange(8)
    path.write_bytes(damaged)
    return sound


@pytest.mark.timeout(3000 if FULL else 120)
def test_every_flipped_bit_outside_the_catalog_is_noticed_and_none_is_served(root: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    dice = random.Random(seed)
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("catalog.sqlite"))
    seen: Counter[str] = Counter()
    with Hub.open(str(root)) as hub:
        versions = hub.versions()
        owners = {
            entry.sha256.hex: (version, name) for version in versions for name, entry in version.manifest.files.items()
        }
        manifests = {version.digest.hex: version for version in versions}
        assert hub.verify() == hub.fsck() == []
        for _ in range(FLIPS):
            path = dice.choice(files)
            sound = flipped(path, dice)
            try:
                if path.name in owners:
                    version, name = owners[path.name]
                    with pytest.raises(BlobCorrupt):
                        hub.read_file(version, name)
                    with pytest.raises(BlobCorrupt):
                        hub.pull(f"{version.full_name}@{version.number}", tmp_path / "out")
                    assert not (tmp_path / "out").exists()
                    seen["file of a version"] += 1
                elif path.name in manifests:
                    assert hub.get(manifests[path.name].digest) == manifests[path.name]  # from the catalog's copy
                    assert {problem.reason for problem in hub.verify()} == {"BLOB_CORRUPT"}
                    seen["manifest"] += 1
                elif path.parent.parent.name == "journal":
                    assert [problem.version for problem in hub.fsck()] != []
                    seen["journal"] += 1
                else:
                    assert path.name == "FORMAT", path
                    with pytest.raises(HubUnavailable):
                        Hub.open(str(root)).close()
                    seen["format"] += 1
            except BaseException:
                print(f"seed {seed}: {path.relative_to(root)}")
                raise
            path.write_bytes(sound)
        assert hub.verify() == hub.fsck() == []
    print(f"\nseed {seed}: {sum(seen.values())} flips, all noticed: {dict(seen)}")
    assert len(seen) == 4


@pytest.mark.timeout(3000 if FULL else 120)
def test_a_bit_flipped_in_the_catalog_is_noticed_or_changes_nothing(root: Path, tmp_path: Path) -> None:
    """SQLite keeps no checksums, and much of a file is unused: what may not happen is a wrong answer that neither an
    error nor verify and fsck tell of. Wrong bytes are never served, told or not."""
    seed = random.SystemRandom().randrange(2**32)
    dice = random.Random(seed)
    sound = state(root)
    contents = {version[1]: version for version in sound[0]}
    told: Counter[str] = Counter()
    for number in range(CATALOG_FLIPS):
        place = tmp_path / "damaged"
        shutil.copytree(root, place)
        flipped(place / "catalog.sqlite", dice)
        try:
            found = state(place)
        except HubError as error:
            told[error.reason] += 1
        else:
            for version in found[0]:
                assert version[2:] == contents[version[1]][2:], (seed, number)
            problems = problems_of(place)
            if found != sound:
                assert problems, (seed, number)
            told["told" if problems else "changed nothing"] += 1
        with suppress(HubError), Hub.open(str(place)) as hub:
            hub.sweep(retention_seconds=0, grace_seconds=0)
        assert blobs_of(place) == blobs_of(root), (seed, number)
        shutil.rmtree(place)
    print(f"\nseed {seed}: {CATALOG_FLIPS} flips in the catalog: {dict(told)}")


def problems_of(root: Path) -> set[str]:
    """What verify and fsck say; also that they cannot read it."""
    try:
        with Hub.open(str(root)) as hub:
            return {problem.reason for problem in hub.verify() + hub.fsck()}
    except HubError as error:
        return {error.reason}


def blobs_of(root: Path) -> set[Path]:
    return {path.relative_to(root) for path in (root / "blobs" / "sha256").rglob("*")}


def state(root: Path) -> tuple[list[tuple[object, ...]], *tuple[object, ...]]:
    """All that the hub at `root` answers."""
    with Hub.open(str(root)) as hub:
        versions = [
            (each.text, each.digest, each.manifest, {name: hub.read_file(each, name) for name in each.manifest.files})
            for each in hub.versions()
        ]
        pages = [hub.search(query) for query in QUERIES]
        return versions, hub.aliases("team/x"), hub.leases(), hub.events(), pages


def test_a_catalog_whose_words_are_no_text_is_refused(root: Path) -> None:
    """Found by the test above: SQLite quotes the damaged schema, and Python's driver failed over the quotation."""
    catalog = root / "catalog.sqlite"
    words = bytearray(catalog.read_bytes())
    words[words.index(b"CREATE TABLE") + 7] = 0xA0
    catalog.write_bytes(words)
    with pytest.raises(HubUnavailable, match="the hub's catalog cannot be used: it holds text that is none"):
        Hub.open(str(root))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("UPDATE events SET after = '[[1, 1]' WHERE after IS NOT NULL", "an event in it is damaged"),
        ("UPDATE events SET alias = NULL", "an event in it is damaged"),
        ("UPDATE events SET digest = replace(digest, 'sha', 'she')", "a digest in it is damaged"),
        ("UPDATE versions SET digest = replace(digest, 'sha', 'she')", "a digest in it is damaged"),
        ("UPDATE versions SET manifest = x'00' WHERE number = 2", "a version in it is damaged"),
        ("UPDATE versions SET content = replace(content, '0', '1')", "team/x@1: the tables differ .* in content"),
        ("UPDATE versions SET base_name = 'other' WHERE number = 2", "team/x@2: the tables differ .* in base_name"),
        ("UPDATE files SET sha256 = replace(sha256, 'a', 'b') WHERE number = 3", "team/x@3: the tables .* in files"),
        ("UPDATE files SET name = 'x' WHERE name = 'README.md'", "team/x@1: the tables differ .* in files"),
        ("DELETE FROM metrics WHERE number = 3", "team/x@3: the tables differ from its manifest in metrics"),
        ("UPDATE metrics SET value = value + 1", "team/x@1: the tables differ from its manifest in metrics"),
        ("UPDATE targets SET weight = 8 WHERE weight = 9", "team/x:canary: the tables have"),
    ],
)
def test_a_damaged_row_is_told_nothing_is_swept_by_it_and_a_rebuild_mends_it(
    root: Path, damage: str, told: str
) -> None:
    """Some of these were found by full runs of the flips above, the files by asking what a sweep reads."""
    with Hub.open(str(root)) as hub:
        sound = (hub.versions(), hub.aliases("team/x"), hub.events())
    with sqlite3.connect(root / "catalog.sqlite") as connection:
        connection.execute(damage)
    connection.close()
    with Hub.open(str(root)) as hub:
        problems = hub.fsck()
        assert [problem.reason for problem in problems if re.search(told, problem.message)] == ["CATALOG_DAMAGED"]
        with pytest.raises(HubUnavailable, match="nothing is swept"):
            hub.sweep(retention_seconds=0, grace_seconds=0)
    rebuild(str(root))
    with Hub.open(str(root)) as hub:
        assert (hub.versions(), hub.aliases("team/x"), hub.events()) == sound
        assert hub.verify() == hub.fsck() == []
        assert hub.sweep(retention_seconds=0, grace_seconds=0).blobs == 0
