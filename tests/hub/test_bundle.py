"""Bundles: out of one hub, into another, with identity, numbers, signatures and aliases."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest

from hub.bundle import Bundle
from hub.errors import AdapterNotFound, BundleRefused, TargetNotEmpty, VersionClash
from hub.exporting import export_bundle
from hub.facade import HubFacade
from hub.hub import Hub
from hub.rebuild import rebuild
from hub.signing import keys
from hub.signing.policy import TrustPolicy
from hub.signing.pushing import sign_version
from tests.hub.making import lora_tensors, write_adapter


def adapter(tmp_path: Path, seed: int) -> Path:
    return write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))


def taken_in(hub: HubFacade, file: Path, *, aliases: bool = False, renumber: bool = False) -> list[tuple[str, str]]:
    with Bundle(file) as bundle:
        adopted = hub.adopt(
            bundle.arrivals, bundle.lay_out, aliases=bundle.aliases if aliases else (), renumber=renumber
        )
    return [(each.version.text, each.outcome) for each in adopted]


def test_what_goes_out_comes_in_as_it_was(hub: HubFacade, tmp_path: Path) -> None:
    ada = keys.generate(tmp_path / "ada.key")
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        versions = [laptop.push(adapter(tmp_path, seed), "team/x", creator="ada").version for seed in (1, 2, 3)]
        child = laptop.push(adapter(tmp_path, 4), "team/y", parents=["team/x@3"]).version
        laptop.split([("team/x@2", 9), ("team/x@3", 1)], "prod")
        laptop.tag("team/x@1", "old")
        sign_version(laptop, versions[2], ada)
        exported, aliases, size = export_bundle(laptop, ["team/x@2", "team/x:latest", "team/y"], tmp_path / "b")
    assert [version.text for version in exported] == ["team/x@2", "team/x@3", "team/y@1"]
    assert {alias.alias for alias in aliases} == {"prod", "latest"}, "an alias goes only with all it holds"
    assert (tmp_path / "b").stat().st_size == size
    assert taken_in(hub, tmp_path / "b") == [
        ("team/x@2", "imported"), ("team/x@3", "imported"), ("team/y@1", "imported"),
    ]  # fmt: skip
    for version in (*versions[1:], child):
        assert hub.get(version.digest) == version
    assert hub.resolve("team/x").number == 3
    assert set(hub.aliases("team/x")) == {"latest"}, "releases move only when asked"
    assert TrustPolicy((ada.public,)).check(versions[2], hub.signatures(versions[2].digest))
    assert [ancestor.digest for ancestor in hub.lineage("team/y").ancestors] == [versions[2].digest]
    hub.pull("team/x@3", tmp_path / "out")
    source = tmp_path / "adapter-3"
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in source.iterdir()
    }
    assert taken_in(hub, tmp_path / "b", aliases=True) == [
        ("team/x@2", "known"), ("team/x@3", "known"), ("team/y@1", "known"),
    ]  # fmt: skip
    assert [(t.version, t.weight) for t in hub.aliases("team/x")["prod"].targets] == [(2, 9), (3, 1)]
    assert hub.push(source, "team/x").version.number == 3, "the same content is the same version"
    assert hub.push(adapter(tmp_path, 5), "team/x").version.number == 4
    assert hub.verify() == []
    assert hub.fsck() == []


def test_the_same_versions_make_the_same_file_which_any_tar_reads(tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        for seed in (1, 2):
            hub.push(adapter(tmp_path, seed), "x")
        export_bundle(hub, ["x*"], tmp_path / "a")
        export_bundle(hub, ["x@2", "x@1"], tmp_path / "b")
        with pytest.raises(TargetNotEmpty):
            export_bundle(hub, ["x"], tmp_path / "a")
        with pytest.raises(AdapterNotFound):
            export_bundle(hub, ["y*"], tmp_path / "c")
        assert {path.name for path in tmp_path.iterdir()} - {"cache"} == {"a", "adapter-1", "adapter-2", "b", "hub"}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with tarfile.open(tmp_path / "a") as archive:
        members = archive.getmembers()
        assert members[0].name == "loraplex-bundle.json"
        for member in members[1:]:
            data = archive.extractfile(member)
            assert data is not None
            assert hashlib.sha256(data.read()).hexdigest() == member.name.rpartition("/")[2]
    assert len({member.name for member in members}) == len(members) == 1 + 2 + 3, "a shared file is there once"


def test_numbers_that_are_taken(tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        theirs = [laptop.push(adapter(tmp_path, seed), "x").version for seed in (1, 2)]
        export_bundle(laptop, ["x@1", "x@2"], tmp_path / "both")
        export_bundle(laptop, ["x@2"], tmp_path / "second")
    with Hub.open(str(tmp_path / "hub")) as hub:
        mine = hub.push(adapter(tmp_path, 7), "x").version
        seq = hub.last_seq()
        with pytest.raises(VersionClash, match="x@1 is other content here") as clash:
            taken_in(hub, tmp_path / "both")
        assert clash.value.reason == "VERSION_CLASH"
        assert "x@2 (its digest stays)" in str(clash.value)
        assert hub.last_seq() == seq, "all or none"
        assert taken_in(hub, tmp_path / "both", renumber=True) == [("x@2", "imported"), ("x@3", "imported")]
        assert [hub.resolve(f"x@{n}").digest for n in (1, 2, 3)] == [v.digest for v in (mine, *theirs)]
        assert hub.resolve("x").number == 3
        assert [e.note for e in hub.events(seq) if e.kind == "push"] == ["import: was x@1", "import: was x@2"]
        assert taken_in(hub, tmp_path / "second") == [("x@3", "known")]
        assert hub.fsck() == []


def test_a_version_that_was_swept_here_is_told_as_that(hub: HubFacade, tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        laptop.push(adapter(tmp_path, 1), "x")
        export_bundle(laptop, ["x@1"], tmp_path / "b")
    taken_in(hub, tmp_path / "b")
    hub.push(adapter(tmp_path, 2), "x")
    hub.remove("x@1")
    hub.sweep(retention_seconds=0, grace_seconds=0)
    with pytest.raises(VersionClash, match=r"x@1 was here and was swept at .*next one, x@3"):
        taken_in(hub, tmp_path / "b")


def test_latest_never_goes_back_with_a_bundles_aliases(hub: HubFacade, tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        for seed in (1, 2):
            laptop.push(adapter(tmp_path, seed), "x")
        laptop.tag("x@2", "prod")
        export_bundle(laptop, ["x@1", "x@2"], tmp_path / "b")
    taken_in(hub, tmp_path / "b")
    hub.push(adapter(tmp_path, 3), "x")
    taken_in(hub, tmp_path / "b", aliases=True)
    assert (hub.resolve("x").number, hub.resolve("x:prod").number) == (3, 2)


def test_numbers_come_in_any_order_and_are_never_given_twice(tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        for seed in range(1, 6):
            laptop.push(adapter(tmp_path, seed), "x")
        for number in (2, 4, 5):
            export_bundle(laptop, [f"x@{number}"], tmp_path / f"b{number}")
    url = str(tmp_path / "hub")
    with Hub.open(url) as hub:
        taken_in(hub, tmp_path / "b4")
        assert hub.resolve("x").number == 4
        taken_in(hub, tmp_path / "b2")
        assert hub.resolve("x").number == 4, ":latest does not go back"
        assert hub.push(adapter(tmp_path, 9), "x").version.number == 5
        with pytest.raises(VersionClash):
            taken_in(hub, tmp_path / "b5")
        hub.tag("x@2", "latest")
        hub.remove("x@5")
        hub.sweep(retention_seconds=0, grace_seconds=0)
        with pytest.raises(VersionClash, match=r"other content here.*--renumber"):
            taken_in(hub, tmp_path / "b5")
        assert taken_in(hub, tmp_path / "b5", renumber=True) == [("x@6", "imported")]
        before = [(v.text, v.digest) for v in hub.versions()]
        assert hub.fsck() == []
    (tmp_path / "hub" / "catalog.sqlite").unlink()
    rebuild(url)
    with Hub.open(url) as hub:
        assert [(v.text, v.digest) for v in hub.versions()] == before
        assert hub.fsck() == []
        assert hub.push(adapter(tmp_path, 10), "x").version.number == 7


def test_the_same_content_of_another_origin_is_refused(tmp_path: Path) -> None:
    source = adapter(tmp_path, 1)
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        laptop.push(source, "x", creator="ada")
        export_bundle(laptop, ["x"], tmp_path / "b")
    with Hub.open(str(tmp_path / "hub")) as hub:
        hub.push(source, "x", creator="bob")
        for renumber in (False, True):
            with pytest.raises(VersionClash, match="cannot keep its identity"):
                taken_in(hub, tmp_path / "b", renumber=renumber)


def test_what_was_removed_comes_back(tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        for seed in (1, 2):
            hub.push(adapter(tmp_path, seed), "x")
        export_bundle(hub, ["x@1"], tmp_path / "b")
        hub.remove("x@1")
        assert taken_in(hub, tmp_path / "b") == [("x@1", "restored")]
        assert hub.resolve("x").number == 2


def test_an_import_mends_what_is_damaged_here(tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        version = hub.push(adapter(tmp_path, 1), "x").version
        export_bundle(hub, ["x"], tmp_path / "b")
        hex_digits = version.manifest.files["adapter_model.safetensors"].sha256.hex
        (tmp_path / "hub" / "blobs" / "sha256" / hex_digits[:2] / hex_digits).unlink()
        assert [problem.reason for problem in hub.verify()] == ["BLOB_CORRUPT"]
        assert taken_in(hub, tmp_path / "b") == [("x@1", "known")]
        assert hub.verify() == []


def test_a_bundle_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        hub.push(adapter(tmp_path, 1), "x")
        calls = 0

        def failing(*arguments: object) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export_bundle(hub, ["x"], tmp_path / "b", failing)
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("hub", "cache", "adapter-1")]
    assert left == []


def test_a_stick_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        hub.push(adapter(tmp_path, 1), "x")

        def refuse(source: Path, target: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("hub.bundle.os.link", refuse)
        export_bundle(hub, ["x"], tmp_path / "b")
        monkeypatch.undo()
        assert taken_in(hub, tmp_path / "b") == [("x@1", "known")]


def test_a_number_far_away_does_not_use_the_others_up(tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        laptop.push(adapter(tmp_path, 1), "x")
        export_bundle(laptop, ["x"], tmp_path / "b")
    with Bundle(tmp_path / "b") as bundle, Hub.open(str(tmp_path / "hub")) as hub:
        from dataclasses import replace

        for number in (0, -1, 5_000_000, 2**31, 10**9):
            with pytest.raises(BundleRefused):
                hub.adopt([replace(bundle.arrivals[0], number=number)], bundle.lay_out)
        assert hub.last_seq() == 0


def test_sizes_beyond_eight_gibibytes_have_a_header(tmp_path: Path) -> None:
    from hub.bundle import _header

    for size in (0, 8**11 - 1, 8**11, 16 * 1024**3):
        assert tarfile.TarInfo.frombuf(_header("x", size), "ascii", "strict").size == size
