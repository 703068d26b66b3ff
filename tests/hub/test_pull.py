"""Where a pull cannot put its directory in the place of the target, and what it says where it can do nothing."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub.errors import HubUnavailable, TargetNotEmpty
from hub.hub import Hub
from tests.hub.making import lora_tensors, write_adapter

FILES = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub.open(str(tmp_path / "hub")) as opened:
        opened.push(write_adapter(tmp_path / "a", tensors=lora_tensors()), "x")
        yield opened


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """An empty directory in one of its own."""
    made = tmp_path / "mnt" / "volume"
    made.mkdir(parents=True)
    return made


def refuse(monkeypatch: pytest.MonkeyPatch, volume: Path, code: int, method: str) -> None:
    """Let making the staging directory beside the volume, or renaming it over the volume, fail."""
    original = getattr(Path, method)

    def refused(path: Path, *arguments: Path, **named: object) -> object:
        if path.parent == volume.parent and path.name.startswith("."):
            raise OSError(code, os.strerror(code))
        return original(path, *arguments, **named)

    monkeypatch.setattr(Path, method, refused)


@pytest.mark.parametrize(
    ("code", "method"),
    [(errno.EBUSY, "rename"), (errno.EXDEV, "rename"), (errno.EPERM, "rename"),
     (errno.EACCES, "mkdir"), (errno.EROFS, "mkdir")],
)  # fmt: skip
def test_an_empty_directory_whose_place_cannot_be_taken_is_filled(
    hub: Hub, volume: Path, monkeypatch: pytest.MonkeyPatch, code: int, method: str
) -> None:
    number = volume.stat().st_ino
    refuse(monkeypatch, volume, code, method)
    version = hub.pull("x", volume)
    assert sorted(path.name for path in volume.iterdir()) == FILES
    assert [path.name for path in volume.parent.iterdir()] == ["volume"]
    assert volume.stat().st_ino == number
    assert (volume / FILES[1]).stat().st_size == version.manifest.files[FILES[1]].bytes
    with pytest.raises(HubUnavailable, match=os.strerror(code)):
        hub.pull("x", volume.parent / "absent")  # nothing there to be filled


def test_a_mounted_volume_is_filled_and_its_lost_and_found_is_nothing(
    hub: Hub, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)
    (volume / "lost+found").mkdir()
    hub.pull("x", volume)
    assert sorted(path.name for path in volume.iterdir()) == [*FILES, "lost+found"]
    with pytest.raises(TargetNotEmpty):
        hub.pull("x", volume)


def test_the_directory_that_the_user_is_in_is_filled(hub: Hub, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another in its place would leave the user's shell in one that is gone."""
    monkeypatch.chdir(volume)
    hub.pull("x", ".")
    assert sorted(os.listdir(".")) == FILES  # noqa: PTH208


def test_a_volume_is_as_it_was_where_filling_it_fails(hub: Hub, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)
    original, moved = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        if path.parent.parent == volume:
            moved.append(path.name)
            if path.name == "adapter_config.json":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(HubUnavailable, match="cannot be written: Input/output error"):
        hub.pull("x", volume)
    assert moved == FILES[::-1]  # the config that loaders look for comes last
    assert list(volume.iterdir()) == []


def test_what_somebody_else_put_into_a_volume_meanwhile_stays(
    hub: Hub, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)

    def put(what: str, done: int, total: int) -> None:
        (volume / FILES[0]).write_text("theirs")

    with pytest.raises(TargetNotEmpty, match="filled by somebody else"):
        hub.pull("x", volume, put)
    assert [path.name for path in volume.iterdir()] == [FILES[0]]
    assert (volume / FILES[0]).read_text() == "theirs"


def test_a_place_that_can_be_no_directory_is_said_to_be_none(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TargetNotEmpty):
        hub.pull("x", "/")
    with pytest.raises(HubUnavailable, match="Not a directory"):
        hub.pull("x", tmp_path / "file" / "out")
    with pytest.raises(HubUnavailable, match="File name too long"):
        hub.pull("x", tmp_path / ("n" * 256))
    hub.pull("x", tmp_path / ("n" * 255))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
