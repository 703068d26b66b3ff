"""ENOSPC and EIO at every open, write, fsync, link, rename and mkdir of every verb: refused, nothing lost, nothing
half-written shown, and once the disk is well again the same call succeeds."""

from __future__ import annotations

import errno
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hub.errors import HubError, HubUnavailable
from hub.hub import Hub
from tests.faults.failing_disk import FailingDisk
from tests.faults.full import FULL
from tests.hub.making import lora_tensors, push_kept, write_adapter

Act = Callable[[Hub, Path], object]

VERBS: dict[str, Act] = {
    "push": lambda hub, tmp: hub.push(tmp / "a3", "team/x", aliases=["prod"]),
    "push kept files": lambda hub, tmp: push_kept(hub, tmp / "a3", "team/x"),
    "push known bytes": lambda hub, tmp: hub.push(tmp / "a1", "team/x", aliases=["prod"]),
    "tag": lambda hub, tmp: hub.tag("team/x@2", "prod"),
    "rm": lambda hub, tmp: hub.remove("team/x@1"),
    "pull": lambda hub, tmp: hub.pull("team/x@2", tmp / "disk" / "out"),
    "pin": lambda hub, tmp: hub.lease("team/x@1", "me"),
}  # fmt: skip

# A disk that stays full, and one that fails once; every mixture in a full run.
FAILURES = [(errno.ENOSPC, True), (errno.EIO, False)]
FAILURES += [(errno.ENOSPC, False), (errno.EIO, True)] if FULL else []


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    (tmp_path / "disk").mkdir()
    return [write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)) for seed in range(4)]


def filled(root: Path, sources: list[Path]) -> None:
    """A hub at `root` with three versions; a copy of one that was made once."""
    template = sources[0].parent / "template"
    if not template.exists():
        with Hub.open(str(template)) as hub:
            for source in sources[:3]:
                hub.push(source, "team/x")
            hub.tag("team/x@3", "prod")
    shutil.copytree(template, root)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("code", "lasting"), FAILURES, ids=lambda value: {True: "lasting", False: "once"}.get(value))
@pytest.mark.parametrize("verb", VERBS)
def test_every_call_that_changes_the_disk_fails_once(
    verb: str, code: int, lasting: bool, tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    act = VERBS[verb]
    filled(tmp_path / "disk" / "rehearsal", sources)
    with Hub.open(str(tmp_path / "disk" / "rehearsal")) as hub:
        with FailingDisk(tmp_path / "disk", code, None).mounted(monkeypatch) as rehearsal:
            act(hub, tmp_path)
    if verb == "pull":
        clear(tmp_path / "disk" / "out")
    assert {"open", "write", "fsync"} <= set(rehearsal.calls)
    for number in range(len(rehearsal.calls)):
        root = tmp_path / "disk" / f"hub-{number}"
        filled(root, sources)
        with Hub.open(str(root)) as hub:
            before = state(hub)
            with FailingDisk(tmp_path / "disk", code, number, lasting=lasting).mounted(monkeypatch) as disk:
                try:
                    act(hub, tmp_path)
                    failed = False
                except HubUnavailable as error:
                    failed = True
                    assert str(tmp_path / "disk" / f"hub-{number}") not in str(error)
            where = (number, disk.calls[-3:])
            assert hub.verify() == [], where
            assert {problem.reason for problem in hub.fsck()} <= {"JOURNAL_BEHIND"}, where
            assert not failed or verb != "pull" or not (tmp_path / "disk" / "out").exists()
            assert list((root / "blobs" / "staging").iterdir()) == [], where
            assert failed or disk.calls[number:] in ([], ["write"]) or state(hub) != before or verb == "pull", where
            clear(tmp_path / "disk" / "out")
            if verb == "rm" and state(hub) != before:
                hub.restore("team/x@1")  # removed: only the journal may have lacked it
            act(hub, tmp_path)
            assert hub.verify() == hub.fsck() == [], where
        with Hub.open(str(root)) as hub:
            assert hub.verify() == hub.fsck() == [], where
        clear(tmp_path / "disk" / "out")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
def test_a_hub_that_cannot_be_made_can_be_made_later(
    code: int, tmp_path: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FailingDisk(tmp_path / "disk", code, None).mounted(monkeypatch) as rehearsal:
        Hub.open(str(tmp_path / "disk" / "rehearsal")).close()
    for number in range(len(rehearsal.calls)):
        root = tmp_path / "disk" / f"hub-{number}"
        with FailingDisk(tmp_path / "disk", code, number).mounted(monkeypatch):
            with pytest.raises(HubUnavailable):
                Hub.open(str(root)).close()
        with Hub.open(str(root)) as hub:
            hub.push(sources[0], "team/x")
            assert hub.verify() == hub.fsck() == []


LIMITED = """
import resource, sys
from hub.errors import HubUnavailable
from hub.hub import Hub

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    with Hub.open(sys.argv[1]) as hub:
        print("pushed", hub.push(sys.argv[2], "team/x").version.number)
except HubUnavailable as error:
    assert sys.argv[1] not in str(error), error
    print("refused")
"""


@pytest.mark.timeout(120)
def test_no_file_may_grow_any_more(tmp_path: Path, sources: list[Path]) -> None:
    """The kernel's own limit, which SQLite's writes meet too: the whole push, at limits from nothing to plenty."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    told = []
    for number, limit in enumerate([0, 100, 3000, 4096, 6000, 20_000, 40_000, 60_000, 100_000, 400_000]):
        root = tmp_path / "disk" / f"hub-{number}"
        filled(root, sources)
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(root), str(sources[3]), str(limit)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.split()[0])
        with Hub.open(str(root)) as hub:
            assert hub.verify() == []
            assert {problem.reason for problem in hub.fsck()} <= {"JOURNAL_BEHIND"}
            if told[-1] == "pushed":
                assert hub.resolve("team/x@4").number == 4
            assert hub.push(sources[3], "team/x").version.number == 4
            assert hub.verify() == hub.fsck() == []
    assert set(told) == {"pushed", "refused"}
    assert told == sorted(told, reverse=True)  # refused up to some limit, pushed from there on


def state(hub: Hub) -> tuple[object, ...]:
    try:
        aliases = {name: each.version for name, each in hub.aliases("team/x").items()}
    except HubError:
        aliases = {}
    return [version.text for version in hub.versions()], aliases, hub.leases(), hub.last_seq()


def clear(directory: Path) -> None:
    if directory.exists():
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
