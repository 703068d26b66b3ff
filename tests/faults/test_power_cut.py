"""A power cut at any moment: what was acknowledged is whole, what was not is whole or absent, and the hub goes on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hub.errors import AdapterNotFound
from hub.hub import Hub
from hub.location import open_local
from tests.faults.full import times
from tests.faults.power_cut import VolatileDisk
from tests.hub.making import lora_tensors, push_kept, write_adapter

SLICE = times(1, 6)  # every so manyth cut is looked at


@dataclass
class Told:
    """What callers were told before a cut."""

    pushed: dict[int, int] = field(default_factory=dict)  # version → which directory
    prod: int | None = None
    removed: frozenset[int] = frozenset()


@pytest.mark.timeout(170)
@pytest.mark.parametrize("names", ["synced", "early"])
@pytest.mark.parametrize("push", [Hub.push, push_kept], ids=["copied", "kept"])
def test_a_power_cut_at_every_moment_of_every_write(
    push: Callable[[Hub, Path, str], object], tmp_path: Path, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)) for seed in range(3)]
    (tmp_path / "disk").mkdir()
    disk = VolatileDisk(tmp_path / "disk", monkeypatch)
    cuts: list[Told] = []
    told = Told()

    def cut(step: str = "fsync") -> None:
        disk.tree(tmp_path / "after" / str(len(cuts)), names)
        cuts.append(Told(dict(told.pushed), told.prod, told.removed))

    with disk.recording(before=cut):
        with Hub(*open_local(tmp_path / "disk" / "made" / "hub", step=cut)) as hub:
            cut()
            for number, source in enumerate(sources[:2], 1):
                push(hub, source, "team/x")
                told.pushed[number] = number - 1
                cut()
            hub.tag("team/x@1", "prod")
            told.prod = 1
            cut()
            hub.tag("team/x@2", "prod")
            told.prod = 2
            cut()
            del told.pushed[1]  # from here on it may be gone
            hub.remove("team/x@1")
            told.removed = frozenset({1})
            cut()
            hub.sweep(retention_seconds=0, grace_seconds=0)
            cut()
            push(hub, sources[2], "team/x")
            told.pushed[3] = 2
            cut()
    assert len(cuts) > 60
    some = random.SystemRandom().randrange(SLICE)
    for number, known in list(enumerate(cuts))[some::SLICE]:
        check(tmp_path / "after" / str(number) / "made" / "hub", known, sources, tmp_path / "out" / str(number))


def check(root: Path, told: Told, sources: list[Path], out: Path) -> None:
    with Hub.open(str(root)) as hub:
        where = (root, told)
        assert hub.verify() == [], where
        assert {problem.reason for problem in hub.fsck()} <= {"JOURNAL_BEHIND"}, where
        held: dict[int, bytes] = {}
        for version in hub.versions():
            held[version.number] = hub.read_file(version, "adapter_model.safetensors")
        for number, source in told.pushed.items():
            assert held[number] == (sources[source] / "adapter_model.safetensors").read_bytes(), where
        assert set(held) - set(told.pushed) <= {1, 2, 3} - told.removed, where
        if told.prod is not None:
            assert hub.aliases("team/x")["prod"].version >= told.prod, where
        if told.removed and 3 in held:
            with pytest.raises(AdapterNotFound):
                hub.resolve("team/x@1")
        # And it goes on.
        for source in sources:
            hub.push(source, "team/x")
        hub.pull("team/x", out)
        assert hub.verify() == hub.fsck() == [], where
