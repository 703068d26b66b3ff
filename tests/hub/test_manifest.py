from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hub.adapter_dir import parse_adapter
from hub.base_identity import BaseIdentity
from hub.errors import BlobCorrupt
from hub.manifest import Manifest
from tests.hub.making import lora_tensors, safetensors, write_adapter


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    adapter = parse_adapter(write_adapter(tmp_path / "a"))
    return Manifest.of(
        adapter, name="team/x", base=BaseIdentity("b"), parents=[], creator="ada", created="2026-01-02T03:04:05Z"
    )


def test_a_manifest_is_read_back_from_its_bytes(manifest: Manifest) -> None:
    assert Manifest.parse(manifest.canonical()) == manifest
    assert Manifest.parse(manifest.canonical()).digest == manifest.digest


def test_who_and_when_do_not_change_the_content_but_the_digest(manifest: Manifest) -> None:
    other = replace(manifest, creator="bob", created="2027-01-01T00:00:00Z")
    assert other.content == manifest.content
    assert other.digest != manifest.digest


@pytest.mark.parametrize("change", [{"name": "y"}, {"base": BaseIdentity("c")}, {"metrics": {"loss": 1}}])
def test_what_it_is_changes_the_content(manifest: Manifest, change: dict[str, object]) -> None:
    assert replace(manifest, **change).content != manifest.content  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"schema": "loraplex.manifest/1"}', b'{"schema": "loraplex.manifest/9", "files": {}}']
)
def test_bytes_that_are_no_manifest_are_damage(data: bytes) -> None:
    with pytest.raises(BlobCorrupt):
        Manifest.parse(data)


def test_another_spelling_of_the_same_json_is_damage(manifest: Manifest) -> None:
    with pytest.raises(BlobCorrupt, match="canonical"):
        Manifest.parse(manifest.canonical().replace(b":", b": ", 1))


@pytest.mark.parametrize(
    "name", ["../evil", "/tmp/evil", "a/README.md", "..", ".", "", "README.md\0", "evil.py", "config.json"]
)
def test_a_file_that_no_version_of_the_kind_has_is_refused(manifest: Manifest, name: str) -> None:
    evil = replace(manifest, files={**manifest.files, name: manifest.files["adapter_config.json"]})
    with pytest.raises(BlobCorrupt, match="which no adapter has"):
        Manifest.parse(evil.canonical())


@pytest.mark.parametrize("size", [-1, 2**40])
def test_a_file_of_a_size_that_none_has_is_refused(manifest: Manifest, size: int) -> None:
    name = "adapter_config.json"
    evil = replace(manifest, files={**manifest.files, name: replace(manifest.files[name], bytes=size)})
    with pytest.raises(BlobCorrupt, match=f"gives {name} {size} bytes; at most"):
        Manifest.parse(evil.canonical())


def test_the_tensors_digest_ignores_the_files_order_and_metadata(tmp_path: Path) -> None:
    tensors = lora_tensors()
    turned = dict(reversed(tensors.items()))
    one = parse_adapter(write_adapter(tmp_path / "a", tensors=tensors))
    other = parse_adapter(write_adapter(tmp_path / "b", weights=safetensors(turned, metadata={"format": "pt"})))
    assert one.tensors_digest == other.tensors_digest
    assert one.files["adapter_model.safetensors"] != other.files["adapter_model.safetensors"]
