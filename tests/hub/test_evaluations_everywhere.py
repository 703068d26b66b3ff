"""Records of scores in every kind of hub: in a directory, in a bucket, behind a server, and by the verbs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import obstore
import pytest
from click.testing import CliRunner

from hub import location
from hub.blobs.bucket import Bucket
from hub.cli import group
from hub.errors import AdapterNotFound, EvaluationRefused, GateRefused, StorageRefused, StorageUnreachable
from hub.evaluation import Evaluation
from hub.evaluations import MAX_RECORDS, Evaluations
from hub.facade import HubFacade
from hub.gate import Gate
from hub.hub import Hub
from hub.refs import Digest
from hub.registry.server import RegistryConfig, RegistryServer
from hub.remote.remote_hub import RemoteHub
from hub.s3_evaluations import S3Records
from hub.versions import Version
from tests.hub.making import lora_tensors, write_adapter
from tests.hub.seaweed import READ_KEY
from tests.hub.test_evaluations import scored
from tests.ports import free_port


def in_bucket(tmp_path: Path, s3_url: str) -> Hub:
    """A hub whose evaluations alone are in the bucket."""
    return Hub(*location.open_parts(str(tmp_path / "hub")), None, Evaluations(S3Records(Bucket.parse(s3_url))))


@pytest.fixture(params=["directory", "bucket", "shared"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HubFacade]:
    """A hub that keeps evaluations in one place after the other."""
    if request.param == "bucket":
        with in_bucket(tmp_path, request.getfixturevalue("s3_url")) as hub:
            yield hub
        return
    with Hub.open(str(tmp_path / "hub")) as hub:
        if request.param == "directory":
            yield hub
            return
        config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "registry-uploads")
        with RegistryServer(hub, None, config) as server, RemoteHub.open(f"grpc://{server.address}") as opened:
            yield opened


def pushed(hub: HubFacade, tmp_path: Path, seed: int = 0) -> Version:
    return hub.push(write_adapter(tmp_path / f"a{seed}", tensors=lora_tensors(seed=seed)), "team/x").version


def test_what_is_added_is_found_again_in_order_and_about_its_version_alone(kept: HubFacade, tmp_path: Path) -> None:
    first, second = pushed(kept, tmp_path), pushed(kept, tmp_path, 1)
    assert kept.evaluations(first.digest) == []
    hub = kept.acting_as("ada")
    for accuracy in (0.5, 0.7, 0.6):
        # Whatever is said of when and by whom, the hub knows better.
        sent = replace(scored(first, accuracy=accuracy), version="other/name@9", at="2001-01-01T00:00:00Z", by="eve")
        written = hub.add_evaluation(sent)
        assert written == replace(scored(first, accuracy=accuracy), at=written.at, by=written.by)
        assert written.by is not None and written.by.endswith("ada") and written.at > "2026"
    found = kept.evaluations(first.digest)
    assert [each.metrics["accuracy"] for each in found] == [0.5, 0.7, 0.6]
    assert found[-1] == written
    assert kept.evaluations(second.digest) == []
    assert kept.fsck() == []


def test_a_gate_passes_and_refuses_by_what_was_recorded(kept: HubFacade, tmp_path: Path) -> None:
    first, second = pushed(kept, tmp_path), pushed(kept, tmp_path, 1)
    gate = Gate.parse(b'require = ["sentiment.accuracy >= 0.6"]\nno_lower = {"sentiment.accuracy" = 0.01}')
    with pytest.raises(GateRefused, match=r"sentiment\.accuracy is not recorded"):
        kept.promote(first.text, "prod", gate)
    kept.add_evaluation(scored(first, accuracy=0.8))
    assert kept.promote(first.text, "prod", gate).version == first
    kept.add_evaluation(scored(second, accuracy=0.7))
    with pytest.raises(GateRefused, match=r"0\.7 >= 0\.79 \(team/x@1 has 0\.8\)"):
        kept.promote(second.text, "prod", gate)
    kept.add_evaluation(scored(second, accuracy=0.9))
    assert kept.promote(second.text, "prod", gate).before == first


def test_a_sweep_takes_the_records_of_versions_that_it_forgot(
    kept: HubFacade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.catalog.now", lambda: "2026-01-01T00:00:00Z")  # pushed again, it has the same digest
    first, second = pushed(kept, tmp_path), pushed(kept, tmp_path, 1)
    for version in (first, second):
        kept.add_evaluation(scored(version))
    kept.remove(first.text)
    kept.sweep(grace_seconds=0)
    kept.restore(first.text)
    assert len(kept.evaluations(first.digest)) == 1
    kept.remove(first.text)
    would = kept.sweep(retention_seconds=0, grace_seconds=0, dry_run=True)
    assert kept.sweep(retention_seconds=0, grace_seconds=0) == would
    with pytest.raises(AdapterNotFound):
        kept.evaluations(first.digest)
    assert pushed(kept, tmp_path).digest == first.digest
    assert kept.evaluations(first.digest) == []
    assert len(kept.evaluations(second.digest)) == 1


def test_what_is_no_sound_record_is_refused_and_not_kept(kept: HubFacade, tmp_path: Path) -> None:
    first, second = pushed(kept, tmp_path), pushed(kept, tmp_path, 1)
    good = scored(first)
    for broken in (
        replace(good, metrics={"accuracy": float("nan")}),
        replace(good, metrics={}, intervals={}),
        replace(good, metrics={f"m{n}": 0.5 for n in range(257)}, intervals={}),
        replace(good, metrics={"no gate\x1b[2J": 0.5}, intervals={}),
        replace(good, intervals={"accuracy": (0.6, 0.4)}),
        replace(good, intervals={"other": (0.4, 0.6)}),
        replace(good, task="two\nlines"),
        replace(good, data={"digest": "sha256:1", "examples": 0}),
        replace(good, data={"digest": "sha256:1", "examples": 9, "more": "x"}),
        replace(good, base={"name": "t" * 1001, "quantization": "nf4"}),
    ):
        with pytest.raises(EvaluationRefused):
            kept.add_evaluation(broken)
    with pytest.raises(AdapterNotFound):
        kept.add_evaluation(replace(good, digest=type(good.digest).of_hex("0" * 64)))
    assert kept.evaluations(first.digest) == kept.evaluations(second.digest) == []


def test_a_version_has_so_many_and_no_more(kept: HubFacade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.evaluations.MAX_RECORDS", 2)
    assert MAX_RECORDS == 1000
    version = pushed(kept, tmp_path)
    for _ in range(2):
        kept.add_evaluation(scored(version))
    with pytest.raises(EvaluationRefused, match=r"team/x@1 has 2 evaluations"):
        kept.add_evaluation(scored(version))
    assert len(kept.evaluations(version.digest)) == 2


def test_objects_lie_where_the_format_says_and_a_broken_one_is_named(tmp_path: Path, s3_url: str) -> None:
    bucket = Bucket.parse(s3_url).connect()
    with in_bucket(tmp_path, s3_url) as hub:
        first, second = pushed(hub, tmp_path), pushed(hub, tmp_path, 1)
        for version in (first, second):
            hub.add_evaluation(scored(version))
        [path] = [meta["path"] for found in obstore.list(bucket, f"evaluations/{first.digest.hex}") for meta in found]
        place, _, name = path.rpartition("/")
        assert place == f"evaluations/{first.digest.hex}" and name.endswith(".json")
        whole = bytes(obstore.get(bucket, path).bytes())
        assert Evaluation.parse(whole) == hub.evaluations(first.digest)[0]
        assert hub.fsck() == []
        obstore.put(bucket, path, whole[:-9])
        obstore.put(bucket, f"evaluations/{second.digest.hex}/{name}", whole)
        assert {(found.file, found.reason) for found in hub.fsck()} == {
            (f"evaluations/{digest.hex[:16]}…/{name}", "BLOB_CORRUPT") for digest in (first.digest, second.digest)
        }
        assert "is about another version" in " ".join(found.message for found in hub.fsck())


def test_every_set_up_keeps_them(hub: HubFacade, tmp_path: Path) -> None:
    version = pushed(hub, tmp_path)
    written = hub.add_evaluation(scored(version))
    assert hub.evaluations(version.digest) == [written] and hub.fsck() == []


def test_a_hub_with_a_directory_keeps_them_there_also_where_its_blobs_are_in_s3(tmp_path: Path, s3_url: str) -> None:
    with Hub.open(f"file://{tmp_path / 'hub'}?blobs={s3_url}") as hub:
        version = pushed(hub, tmp_path)
        written = hub.add_evaluation(scored(version))
    [file] = (tmp_path / "hub" / "evaluations" / version.digest.hex).iterdir()
    assert Evaluation.parse(file.read_bytes()) == written
    assert list(obstore.list(Bucket.parse(s3_url).connect(), "evaluations")) == []


def test_who_may_read_the_bucket_alone_reads_them_and_adds_none(
    tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_bucket(tmp_path, s3_url) as hub:
        version = pushed(hub, tmp_path)
        hub.add_evaluation(scored(version))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READ_KEY)
    with in_bucket(tmp_path, s3_url) as hub:
        with pytest.raises(StorageRefused):
            hub.add_evaluation(scored(version))
        assert len(hub.evaluations(version.digest)) == 1


def test_a_bucket_that_is_away_is_told_and_is_no_damage(
    tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    with in_bucket(tmp_path, s3_url) as hub:
        version = pushed(hub, tmp_path)
    with in_bucket(tmp_path, f"s3://adapters/hub?endpoint=http://127.0.0.1:{port}") as hub:
        for look in (lambda: hub.evaluations(version.digest), lambda: hub.add_evaluation(scored(version)), hub.fsck):
            with pytest.raises(StorageUnreachable):
                look()

    def away(self: S3Records, digest: Digest) -> None:
        raise StorageUnreachable("away")

    with in_bucket(tmp_path, s3_url) as hub:
        hub.add_evaluation(scored(version))
        monkeypatch.setattr(S3Records, "read", away)  # since it listed them
        with pytest.raises(StorageUnreachable):
            hub.fsck()


def test_the_verbs_in_postgresql_with_s3(tmp_path: Path, postgres_database: str, s3_url: str) -> None:
    """Nothing of it on this machine: shown, asked for by a gate, checked and swept."""
    url = f"{postgres_database}?blobs={s3_url}"
    (tmp_path / "gate.toml").write_text('require = ["sentiment.accuracy >= 0.6"]')

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(group, [*words, "--hub", url])
        return done.exit_code, done.output + str(done.exception or "")

    with Hub.open(url) as hub:
        version = pushed(hub, tmp_path)
        promote = ("promote", version.text, "prod", "--gate", str(tmp_path / "gate.toml"))
        assert "sentiment.accuracy is not recorded" in run(*promote)[1]
        hub.add_evaluation(scored(version, accuracy=0.7))
        assert run(*promote)[0] == 0
        [shown] = json.loads(run("show", version.text, "--json")[1])["evaluations"]
        assert shown["metrics"] == {"accuracy": 0.7}
        assert "evaluation: sentiment" in run("show", version.text)[1]
        assert hub.fsck() == []
        hub.untag("team/x", "prod")
        hub.untag("team/x", "latest")
        hub.remove(version.text)
        hub.sweep(retention_seconds=0, grace_seconds=0)
    assert [
        meta["path"] for found in obstore.list(Bucket.parse(s3_url).connect(), "evaluations") for meta in found
    ] == []
