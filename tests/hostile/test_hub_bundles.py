"""Hostile bundles: each refused with its reason before anything is entered, and the hub left as it was."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hub import json_text
from hub.arrivals import Arrival
from hub.bundle import INDEX, Bundle, BundleWriter, Packed
from hub.errors import HubError
from hub.exporting import export_bundle
from hub.hub import Hub
from hub.manifest import Manifest
from tests.hub.making import f32, lora_tensors, write_adapter

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sound bundle of two versions."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with Hub.open(str(tmp_path / "laptop")) as hub:
        for seed in (1, 2):
            hub.push(write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)), "team/x")
        export_bundle(hub, ["team/x@1", "team/x@2"], tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def refused(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Import a file, which must be refused for a reason; the message."""
    with Hub.open(str(tmp_path / "hub")) as hub:

        def take(file: Path, *reasons: str, renumber: bool = False) -> str:
            before = sorted(path.name for path in tmp_path.iterdir())
            with pytest.raises(HubError) as caught:
                with Bundle(file) as bundle:
                    hub.adopt(bundle.arrivals, bundle.lay_out, aliases=bundle.aliases, renumber=renumber)
            assert caught.value.reason in (reasons or ("BUNDLE_REFUSED",))
            assert str(tmp_path / "hub") not in str(caught.value)
            assert str(caught.value).isprintable()
            assert hub.last_seq() == 0
            assert hub.versions() == []
            assert sorted(path.name for path in tmp_path.iterdir()) == before, "nothing was written elsewhere"
            return str(caught.value)

        yield take
        assert hub.fsck() == []


def members_of(file: Path) -> Members:
    with tarfile.open(file) as archive:
        found = []
        for member in archive.getmembers():
            data = archive.extractfile(member)
            found.append((member, data.read() if data is not None else b""))
        return found


def write(file: Path, members: Members, **options: Any) -> Path:
    with tarfile.open(file, "w", format=tarfile.GNU_FORMAT, **options) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return file


def plain(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o444
    return info, data


def reindexed(members: Members, change: Callable[[dict[str, Any]], object]) -> Members:
    index = json.loads(members[0][1])
    del index["sha256"]
    change(index)
    with suppress(ValueError, TypeError):  # some changes have no canonical form
        index["sha256"] = json_text.digest_of(index)
    return [plain(INDEX, json_text.canonical(index)), *members[1:]]


def test_the_helpers_write_what_is_taken(source: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again", reindexed(members_of(source), lambda index: None))
    with Hub.open(str(tmp_path / "hub")) as hub, Bundle(again) as bundle:
        assert len(hub.adopt(bundle.arrivals, bundle.lay_out)) == 2


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/cron.d/evil", "blobs/../../evil", "a\\b", "blobs/sha256/" + "0" * 64]
)
def test_a_member_of_another_name_is_refused_and_not_extracted(
    name: str, source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    members = members_of(source)
    refused(write(tmp_path / "first", [members[0], plain(name, b"evil"), *members[1:]]))
    refused(write(tmp_path / "last", [*members, plain(name, b"evil")]))
    refused(write(tmp_path / "instead", [members[0], plain(name, members[1][1]), *members[2:]]))
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE],
)
def test_links_folders_and_devices_are_refused(
    kind: bytes, source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    members = members_of(source)
    info, _ = members[1]
    info.type, info.linkname, info.size = kind, "/etc/passwd", 0
    refused(write(tmp_path / "linked", [members[0], (info, b""), *members[2:]]))


def test_a_file_under_a_sound_name_with_a_link_in_it_is_refused(
    source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    members = members_of(source)
    members[1][0].linkname = "/etc/passwd"
    refused(write(tmp_path / "named", members))


def test_members_twice_missing_or_in_another_order_are_refused(
    source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    members = members_of(source)
    refused(write(tmp_path / "twice", [*members[:2], *members[1:]]))
    refused(write(tmp_path / "index twice", [members[0], *members]))
    refused(write(tmp_path / "less", members[:-1]))
    refused(write(tmp_path / "shuffled", [members[0], members[2], members[1], *members[3:]]))
    refused(write(tmp_path / "late", [*members[1:], members[0]]))


def test_a_bundle_cut_anywhere_is_refused(source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    data = source.read_bytes()
    random = np.random.default_rng()
    for size in {0, 1, 511, 512, 513, len(data) - 1, len(data) - 512, *map(int, random.integers(0, len(data), 20))}:
        (tmp_path / "cut").write_bytes(data[:size])
        refused(tmp_path / "cut")


def test_every_flipped_bit_is_found(source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    data = source.read_bytes()
    random = np.random.default_rng()
    kept = 0
    checksum = range(148, 156)  # of the first header: covered by no other
    for position in [*checksum, *map(int, random.integers(0, len(data), 150))]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << int(random.integers(8))
        (tmp_path / "flipped").write_bytes(flipped)
        try:
            with Bundle(tmp_path / "flipped") as bundle:
                found = [(arrival.text, arrival.digest) for arrival in bundle.arrivals]
        except HubError:
            continue
        # Only what says nothing may differ: a header's owner or mode has its own checksum, so not even that.
        kept += 1
        with Bundle(source) as sound:
            assert found == [(arrival.text, arrival.digest) for arrival in sound.arrivals]
    assert kept == 0


def test_sizes_that_lie_are_refused_before_they_are_believed(
    source: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    members = members_of(source)
    for size in (2**62, 2**40, 16 * 1024**3, -1, 1.5, True, "9"):

        def lie(index: dict[str, Any], size: Any = size) -> None:
            index["blobs"][1]["bytes"] = size

        refused(write(tmp_path / "lie", reindexed(members, lie)))
    huge, _ = plain(INDEX, b"")
    huge.size = 2**40
    (tmp_path / "huge").write_bytes(huge.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    assert "too large" in refused(tmp_path / "huge")
    swollen = bytearray(source.read_bytes())
    swollen += os.urandom(1024)
    (tmp_path / "more").write_bytes(swollen)
    assert "more in it" in refused(tmp_path / "more")


INDEXES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another schema": lambda index: index.update(schema="loraplex.bundle/2"),
    "a key more": lambda index: index.update(code="x"),
    "no versions": lambda index: index.update(versions=[]),
    "versions of another kind": lambda index: index.update(versions={"a": 1}),
    "a version that is none": lambda index: index["versions"].append(3),
    "a version twice": lambda index: index["versions"].append(index["versions"][0]),
    "a blob twice": lambda index: index["blobs"].append(index["blobs"][0]),
    "a blob less": lambda index: index["blobs"].pop(),
    "a digest that is a path": lambda index: index["blobs"][0].update(sha256="sha256:../../../etc/passwd"),
    "another name": lambda index: index["versions"][0].update(name="team/y"),
    "a name that is a path": lambda index: index["versions"][0].update(name="../x"),
    "another version's number": lambda index: index["versions"][0].update(number=2),
    "number 0": lambda index: index["versions"][0].update(number=0),
    "a number that is text": lambda index: index["versions"][0].update(number="1"),
    "a number that is a truth": lambda index: index["versions"][0].update(number=True),
    "a number without end": lambda index: index["versions"][0].update(number=10**12),
    "a version that is a file": lambda index: index["versions"][0].update(digest=index["blobs"][1]["sha256"]),
    "a version less": lambda index: index["versions"].pop(),
    "a signature that is a file": lambda index: index["versions"][0]["signatures"].append(index["blobs"][1]["sha256"]),
    "a signature that is not there": lambda index: index["versions"][0]["signatures"].append("sha256:" + "0" * 64),
    "an alias that holds nothing": lambda index: index["aliases"][0].update(targets=[]),
    "an alias of what does not come": lambda index: index["aliases"][0].update(targets=[[7, 1]]),
    "an alias of another adapter": lambda index: index["aliases"][0].update(name="other/y"),
    "an alias that is a path": lambda index: index["aliases"][0].update(alias="../prod"),
    "an alias without weight": lambda index: index["aliases"][0].update(targets=[[1, 0]]),
    "an alias twice": lambda index: index["aliases"].append(index["aliases"][0]),
}


@pytest.mark.parametrize("how", INDEXES)
def test_an_index_that_lies_is_refused(how: str, source: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    file = write(tmp_path / "lie", reindexed(members_of(source), INDEXES[how]))
    refused(file, "BUNDLE_REFUSED", "REF_INVALID", "QUERY_INVALID", "SIGNATURE_INVALID")


def test_what_is_no_bundle(tmp_path: Path, source: Path, refused: Callable[..., str]) -> None:
    write(tmp_path / "zipped", members_of(source))
    with tarfile.open(tmp_path / "gz", "w:gz") as archive:
        archive.add(source, "x")
    (tmp_path / "text").write_text("hello\n" * 1000)
    (tmp_path / "zeros").write_bytes(bytes(10_240))
    for name in ("gz", "text", "zeros"):
        refused(tmp_path / name)
    refused(tmp_path / "nothing", "HUB_UNAVAILABLE")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "HUB_UNAVAILABLE")


def packed(tmp_path: Path, directory: Path, change: Callable[[Manifest], Manifest]) -> Path:
    """A bundle, sound as a file, of what is in `directory`, with a manifest that somebody wrote himself."""
    from hub.base_identity import BaseIdentity
    from hub.manifest import FileEntry, LoraFacts
    from hub.refs import Digest

    def entry(path: Path) -> FileEntry:
        import hashlib

        data = path.read_bytes()
        return FileEntry(Digest.of_hex(hashlib.sha256(data).hexdigest()), len(data))

    manifest = Manifest(
        name="team/x",
        files={path.name: entry(path) for path in sorted(directory.iterdir())},
        tensors=Digest.parse("sha256:" + "0" * 64),
        base=BaseIdentity("tiny-base"),
        lora=LoraFacts({"4": 4}, 8, ("q_proj", "v_proj"), 4, 576, ("F32",), ()),
        created="2026-01-01T00:00:00Z",
    )
    arrival = Arrival(1, change(manifest))
    target = tmp_path / "made"
    target.unlink(missing_ok=True)
    BundleWriter([arrival], []).write(target, iter([Packed(arrival, directory)]))
    return target


def test_a_bundle_brings_nothing_that_a_push_would_not_take(tmp_path: Path, refused: Callable[..., str]) -> None:
    """Rows 13 to 20 hold for every door."""
    tensors = lora_tensors()
    name = next(iter(tensors))
    nan = {**tensors, name: f32(np.full(tensors[name][1], np.nan))}
    cases: list[tuple[Path, str]] = [
        (write_adapter(tmp_path / "nan", tensors=nan), "NON_FINITE"),
        (write_adapter(tmp_path / "code", config={"auto_mapping": {"x": "y"}}), "CONFIG_KEY_REFUSED"),
        (write_adapter(tmp_path / "rank", config={"r": 65_536}), "RANK_INVALID"),
        (write_adapter(tmp_path / "torn", weights=b"\xff" * 100), "SAFETENSORS_MALFORMED"),
    ]
    for directory, reason in cases:
        message = refused(packed(tmp_path, directory, lambda manifest: manifest), reason)
        assert "team/x@1" in message
        assert "loraplex-import" not in message


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest,  # its tensors' digest is of nothing
        lambda manifest: replace(manifest, metrics={"f1": 1.0}),
        lambda manifest: replace(manifest, lora=replace(manifest.lora, ranks={"8": 4})),
    ],
)
def test_a_manifest_that_tells_what_is_not_so_is_refused(
    tmp_path: Path, refused: Callable[..., str], change: Callable[[Manifest], Manifest]
) -> None:
    assert "tensors" in refused(packed(tmp_path, write_adapter(tmp_path / "a"), change))


@pytest.mark.parametrize("name", ["../evil", "evil.py", "training_args.bin", "chat_template.jinja", "/tmp/evil"])
def test_a_manifest_with_other_files_is_refused(tmp_path: Path, refused: Callable[..., str], name: str) -> None:
    directory = write_adapter(tmp_path / "a")

    def change(manifest: Manifest) -> Manifest:
        return replace(manifest, files={name: manifest.files["adapter_config.json"], **manifest.files})

    refused(packed(tmp_path, directory, change))
    assert not list(tmp_path.rglob("evil*"))
