"""Imports and signatures that are cut at every step, and that meet a sweep: all or nothing, and sound afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hub import location
from hub.bundle import Bundle
from hub.exporting import export_bundle
from hub.hub import Hub
from hub.signing import envelope, keys
from tests.hub.making import lora_tensors, write_adapter


class Cut(BaseException):
    """The process dies here."""


def adapter(tmp_path: Path, seed: int) -> Path:
    return write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))


def cut_everywhere(
    root: Callable[[int], Path], act: Callable[[Hub], object], check: Callable[[Hub, bool], None]
) -> int:
    """`act` in a new hub each time, dead at every third step from a random one on; about how many steps there are."""
    number = random.randint(-2, 0)
    while True:
        number += 3
        left = number
        name = ""

        def step(reached: str) -> None:
            nonlocal left, name
            left -= 1
            if left == 0:
                name = reached
                raise Cut

        directory = root(number)
        with Hub(*location.open_local(directory, step=step)) as hub:
            try:
                act(hub)
                done = True
            except Cut:
                done = False
        with Hub.open(str(directory)) as hub:
            check(hub, done)
            assert hub.fsck() == [], name
            assert hub.verify() == [], name
        if done:
            return number - 1


def test_an_import_cut_at_every_step_is_whole_or_not_there(tmp_path: Path) -> None:
    ada = keys.generate(tmp_path / "ada")
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        for seed in (1, 2):
            version = laptop.push(adapter(tmp_path, seed), "x").version
            laptop.add_signature(version.digest, envelope.sign(version, ada))
        laptop.tag("x@1", "prod")
        export_bundle(laptop, ["x@1", "x@2"], tmp_path / "b")

    def act(hub: Hub) -> None:
        with Bundle(tmp_path / "b") as bundle:
            hub.adopt(bundle.arrivals, bundle.lay_out, aliases=bundle.aliases)

    def check(hub: Hub, done: bool) -> None:
        found = [version.text for version in hub.versions()]
        assert found in ([], ["x@1", "x@2"])
        assert not done or found
        if found:
            assert [len(hub.signatures(version.digest)) for version in hub.versions()] == [1, 1]
            assert hub.aliases("x")["prod"].version == 1
        act(hub)  # said again it comes to its end
        assert len(hub.versions()) == 2
        hub.sweep(retention_seconds=0, grace_seconds=0)

    assert cut_everywhere(lambda number: tmp_path / f"hub-{number}", act, check) > 30


def test_a_signature_cut_at_every_step_is_there_or_not(tmp_path: Path) -> None:
    ada = keys.generate(tmp_path / "ada")
    source = adapter(tmp_path, 1)

    def root(number: int) -> Path:
        with Hub.open(str(tmp_path / f"hub-{number}")) as hub:
            hub.push(source, "x")
        return tmp_path / f"hub-{number}"

    def act(hub: Hub) -> None:
        version = hub.resolve("x")
        hub.add_signature(version.digest, envelope.sign(version, ada))

    def check(hub: Hub, done: bool) -> None:
        count = len(hub.signatures(hub.resolve("x").digest))
        assert count == 1 if done else count in (0, 1)
        hub.tag("x@1", "later")  # a next write brings the journal up

    assert cut_everywhere(root, act, check) > 5


def test_a_sweep_beside_an_import_takes_nothing_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        laptop.push(adapter(tmp_path, 1), "x")
        export_bundle(laptop, ["x"], tmp_path / "b")
    with Hub.open(str(tmp_path / "hub")) as hub, Bundle(tmp_path / "b") as bundle:
        adopt, sweeps = hub._catalog.adopt, 0

        def swept_first(*arguments: object) -> object:
            nonlocal sweeps
            sweeps += 1
            if sweeps <= 2:
                assert hub.sweep(retention_seconds=0, grace_seconds=0).blobs > 0
            return adopt(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(hub._catalog, "adopt", swept_first)
        hub.adopt(bundle.arrivals, bundle.lay_out)
        assert sweeps == 3
        assert hub.verify() == []
        assert hub.fsck() == []


def test_a_sweep_beside_a_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ada = keys.generate(tmp_path / "ada")
    with Hub.open(str(tmp_path / "hub")) as hub:
        version = hub.push(adapter(tmp_path, 1), "x").version
        sign, sweeps = hub._catalog.sign, 0

        def swept_first(*arguments: object) -> bool:
            nonlocal sweeps
            sweeps += 1
            if sweeps == 1:
                assert hub.sweep(retention_seconds=0, grace_seconds=0).blobs == 1
            return sign(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(hub._catalog, "sign", swept_first)
        assert hub.add_signature(version.digest, envelope.sign(version, ada))
        assert sweeps == 2
        assert len(hub.signatures(version.digest)) == 1
        assert hub.verify() == []
