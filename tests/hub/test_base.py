from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from hub import base
from hub.base import base_identity, fingerprint_directory, locate_base
from hub.errors import BaseMalformed, BaseNotFound
from hub.fingerprint import known_shapes
from hub.safetensors_file import mapped
from tests.hub.making import safetensors, write_base


def fake_built_in() -> Path:
    return write_base(Path(BUILT_IN["directory"]))


BUILT_IN: dict[str, str] = {}


@pytest.fixture
def built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    BUILT_IN["directory"] = str(tmp_path / "built-in")
    entries = [
        EntryPoint("tiny", f"{__name__}:fake_built_in", "hub.bases"),
        EntryPoint("broken", "no_such_module_at_all:x", "hub.bases"),
    ]
    monkeypatch.setattr(
        base, "entry_points", lambda group, name=None: [e for e in entries if name is None or e.name == name]
    )
    monkeypatch.setattr(
        EntryPoint, "load", lambda self: fake_built_in if self.name == "tiny" else __import__("no_such")
    )
    return tmp_path / "built-in"


def test_a_built_in_name_is_found_by_entry_point(built_in: Path) -> None:
    located = locate_base("tiny")
    assert (located.name, located.revision, located.directory) == ("tiny", None, built_in)


def test_a_built_in_that_cannot_be_imported_says_so(built_in: Path) -> None:
    with pytest.raises(BaseNotFound, match="'broken' cannot be loaded"):
        locate_base("broken")


def test_a_directory_is_named_by_its_last_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path / "models" / "mine")
    monkeypatch.chdir(tmp_path / "models")
    located = locate_base("mine")
    assert (located.name, located.directory) == ("mine", tmp_path / "models" / "mine")
    identity, fingerprint = base_identity("mine")
    assert (identity.name, identity.fingerprint) == ("mine", fingerprint.fingerprint)


def test_an_unknown_name_is_answered_with_what_there_is(built_in: Path) -> None:
    with pytest.raises(BaseNotFound, match=r"built-in name \(broken, tiny\)"):
        locate_base("nope")


def test_a_hugging_face_id_is_downloaded_at_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    commit = "0123456789" * 4
    write_base(tmp_path / commit)
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path / commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    located = locate_base("org/model.v2@main")
    assert (asked["name"], asked["revision"]) == ("org/model.v2", "main")
    assert (located.name, located.revision) == ("org/model.v2", commit)


def test_a_hugging_face_id_that_is_not_cached_says_what_to_run_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BaseNotFound, match="hf download org/not-here"):
        locate_base("org/not-here")


def test_a_directory_without_config_or_weights_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(BaseMalformed, match=r"config\.json"):
        locate_base(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BaseMalformed, match=r"\*\.safetensors is missing"):
        fingerprint_directory(tmp_path)


def reshard(source: Path, target: Path) -> Path:
    """The same model in two files, as transformers shards it."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    with mapped(source / "model.safetensors") as opened:
        names = sorted(opened.slots, reverse=True)
        parts = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
        for file, part in parts.items():
            slots = opened.slots
            tensors = {name: (slots[name].dtype, slots[name].shape, bytes(opened.bytes_of(name))) for name in part}
            (target / file).write_bytes(safetensors(tensors, metadata={"format": "pt"}))
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


def test_sharding_anew_keeps_the_fingerprint(tmp_path: Path) -> None:
    whole = fingerprint_directory(write_base(tmp_path / "whole"))
    sharded = fingerprint_directory(reshard(tmp_path / "whole", tmp_path / "sharded"))
    assert sharded.fingerprint == whole.fingerprint
    assert sharded.shapes == whole.shapes


def test_one_bit_of_one_weight_changes_the_fingerprint(tmp_path: Path) -> None:
    before = fingerprint_directory(write_base(tmp_path / "base"))
    weights = tmp_path / "base" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert fingerprint_directory(tmp_path / "base").fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("change", "same"),
    [({"transformers_version": "9"}, True), ({"_name_or_path": "/home/x"}, True), ({"torch_dtype": "float32"}, True),
     ({"use_cache": False}, True), ({"hidden_size": 17}, False), ({"rope_theta": 5.0}, False)],
)  # fmt: skip
def test_the_config_counts_where_it_changes_the_function(tmp_path: Path, change: dict[str, Any], same: bool) -> None:
    before = fingerprint_directory(write_base(tmp_path / "base"))
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    assert (fingerprint_directory(tmp_path / "base").fingerprint == before.fingerprint) is same


def test_the_fingerprint_is_remembered_and_its_shapes_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fingerprint_directory(write_base(tmp_path / "base"))
    monkeypatch.setattr("hub.fingerprint._computed", lambda *arguments: pytest.fail("hashed again"))
    assert fingerprint_directory(tmp_path / "base") == first
    assert known_shapes(first.fingerprint) == first.shapes
    assert known_shapes("sha256:" + "0" * 64) is None


def test_a_damaged_cache_is_computed_anew(tmp_path: Path) -> None:
    first = fingerprint_directory(write_base(tmp_path / "base"))
    for entry in (tmp_path / "cache").rglob("*.json"):
        entry.write_text('{"fingerprint": 3')
    assert fingerprint_directory(tmp_path / "base") == first
