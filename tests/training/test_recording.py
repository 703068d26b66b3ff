"""`hub eval --record`: what it writes into a shared hub, and what it refuses before any answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from hub.errors import AdapterNotFound, EvaluationsUnsupported, HubNotFound
from hub.hub import Hub
from hub.registry.server import RegistryConfig, RegistryServer
from hub.remote.remote_hub import RemoteHub
from tests.hub.making import write_adapter
from training import recording
from training.bootstrap import Interval

RESULTS = {"team/x:latest": {"accuracy": (0.75, Interval(0.5, 1.0))}}


def test_scores_go_to_the_version_that_was_scored_on_a_shared_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
    with Hub.open(str(tmp_path / "hub")) as store, RegistryServer(store, None, config) as server:
        url = f"grpc://{server.address}"
        scored = store.push(write_adapter(tmp_path / "a"), "team/x").version
        recording.check_kept(["team/x:latest"], url)
        store.push(write_adapter(tmp_path / "b", config={"lora_alpha": 16}), "team/x")  # latest moves meanwhile
        told = recording.record(
            ["team/x:latest"], {"team/x:latest": scored.digest}, RESULTS, url,
            task="sentiment", data={"digest": "sha256:1", "examples": 4}, base={"name": "t", "quantization": "none"},
        )  # fmt: skip
        assert told == ["team/x@1"]
        [kept] = store.evaluations(scored.digest)
        assert (kept.metrics, kept.intervals) == ({"accuracy": 0.75}, {"accuracy": (0.5, 1.0)})
        assert store.evaluations(store.resolve("team/x").digest) == []


def test_what_could_not_be_recorded_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = str(tmp_path / "hub")
    with pytest.raises(HubNotFound):
        recording.check_kept(["team/x"], hub)
    with Hub.open(hub) as store:
        version = store.push(write_adapter(tmp_path / "a"), "team/x").version
    recording.check_kept(["team/x"], hub)
    with pytest.raises(AdapterNotFound):
        recording.check_kept(["team/y"], hub)
    # A damaged record is for fsck to tell, and keeps no new one out.
    damaged = tmp_path / "hub" / "evaluations" / version.digest.hex / "20270115T080000.250000-00000000.json"
    damaged.parent.mkdir(parents=True)
    damaged.write_text("{")
    recording.check_kept(["team/x"], hub)

    def older(self: RemoteHub, digest: object) -> None:
        raise EvaluationsUnsupported("update the server")

    monkeypatch.setattr(RemoteHub, "evaluations", older)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
    with (
        Hub.open(hub) as store,
        RegistryServer(store, None, config) as server,
        pytest.raises(EvaluationsUnsupported),
    ):
        recording.check_kept(["team/x"], f"grpc://{server.address}")
