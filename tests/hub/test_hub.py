from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from hub.base_identity import BaseIdentity
from hub.errors import (
    AdapterNotFound,
    AliasMoved,
    AliasNotFound,
    BaseMismatch,
    FileNotInVersion,
    HubUnavailable,
    RefInvalid,
    TargetNotEmpty,
    VersionNotFound,
)
from hub.facts import Facts
from hub.hub import Event, Hub
from hub.manifest import Manifest
from hub.rebuild import rebuild
from hub.refs import AdapterRef
from tests.hub.making import lora_tensors, write_adapter, write_base


def adapter(tmp_path: Path, seed: int) -> Path:
    return write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))


def test_versions_are_numbered_and_latest_follows(hub: Hub, tmp_path: Path) -> None:
    first = hub.push(adapter(tmp_path, 1), "team/x")
    second = hub.push(adapter(tmp_path, 2), "team/x")
    assert (first.version.text, second.version.text) == ("team/x@1", "team/x@2")
    assert hub.resolve("team/x") == hub.resolve("team/x:latest") == second.version
    assert hub.resolve("team/x@1") == hub.get(first.version.digest) == first.version
    assert hub.resolve(AdapterRef.parse(f"team/x@{first.version.digest}")) == first.version


def test_the_digest_is_that_of_the_canonical_manifest(hub: Hub, tmp_path: Path) -> None:
    version = hub.push(adapter(tmp_path, 1), "x").version
    assert version.digest == version.manifest.digest
    assert Manifest.parse(version.manifest.canonical()) == version.manifest


def test_pushing_the_same_content_again_creates_nothing(hub: Hub, tmp_path: Path) -> None:
    first = hub.push(adapter(tmp_path, 1), "x", creator="ada")
    hub.push(adapter(tmp_path, 2), "x")
    before = hub.last_seq()
    again = hub.push(adapter(tmp_path, 1), "x", creator="somebody else")
    assert (again.created, again.version) == (False, first.version)
    assert hub.last_seq() == before
    assert hub.resolve("x").number == 2


def test_pushing_known_content_still_moves_the_aliases_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.push(adapter(tmp_path, 1), "x")
    hub.push(adapter(tmp_path, 2), "x")
    hub.push(adapter(tmp_path, 1), "x:stable", aliases=["prod"])
    assert {alias: state.version for alias, state in hub.aliases("x").items()} == {"latest": 2, "prod": 1, "stable": 1}


def test_the_same_files_on_another_base_are_another_version(hub: Hub, tmp_path: Path) -> None:
    unverified = hub.push(adapter(tmp_path, 1), "x")
    verified = hub.push(adapter(tmp_path, 1), "x", base=str(write_base(tmp_path / "base")))
    assert (unverified.version.number, verified.version.number) == (1, 2)


def test_the_same_content_under_two_names_shares_blobs_but_not_identity(hub: Hub, tmp_path: Path) -> None:
    one = hub.push(adapter(tmp_path, 1), "x").version
    other = hub.push(adapter(tmp_path, 1), "y").version
    assert one.manifest.files == other.manifest.files
    assert one.digest != other.digest


def test_what_is_not_there_is_told_apart(hub: Hub, tmp_path: Path) -> None:
    hub.push(adapter(tmp_path, 1), "x")
    with pytest.raises(AdapterNotFound):
        hub.resolve("y")
    with pytest.raises(VersionNotFound):
        hub.resolve("x@2")
    with pytest.raises(AliasNotFound):
        hub.resolve("x:prod")
    with pytest.raises(AdapterNotFound):
        hub.get("sha256:" + "0" * 64)
    with pytest.raises(AdapterNotFound):
        hub.push(adapter(tmp_path, 2), "x", parents=["nobody@1"])
    assert hub.resolve("x").number == 1


@pytest.mark.parametrize("ref", ["x@1", "x@sha256:" + "0" * 64])
def test_a_push_cannot_choose_its_number(hub: Hub, tmp_path: Path, ref: str) -> None:
    with pytest.raises(RefInvalid, match="numbers versions itself"):
        hub.push(adapter(tmp_path, 1), ref)


def test_facts_and_parents_are_recorded(hub: Hub, tmp_path: Path) -> None:
    parent = hub.push(adapter(tmp_path, 1), "x").version
    base = BaseIdentity("smollm2-135m", None, "sha256:" + "ab" * 32, "nf4")
    facts = Facts({"method": "qlora", "rate": 2e-4}, [{"sha256": "00"}], {"accuracy": 0.73}, {"seed": 2**63}, base)
    facts.write(adapter(tmp_path, 2))
    manifest = hub.push(tmp_path / "adapter-2", "x", parents=["x@1"], creator="ada").version.manifest
    assert manifest.recipe == {"method": "qlora", "rate": 2e-4}
    assert (manifest.metrics, manifest.seeds) == ({"accuracy": 0.73}, {"seed": 2**63})
    assert (manifest.base, manifest.parents, manifest.creator) == (base, (parent.digest,), "ada")


def test_the_base_is_taken_from_the_option_then_the_facts_then_the_config(hub: Hub, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    given = hub.push(adapter(tmp_path, 1), "a", base=str(base))
    assert given.version.manifest.base.fingerprint
    assert given.warnings == ()
    config = write_adapter(tmp_path / "c", config={"base_model_name_or_path": "/home/ada/models/tiny"})
    stated = hub.push(config, "b")
    assert stated.version.manifest.base == BaseIdentity("tiny")
    assert "unverified" in stated.warnings[0]
    Facts(base=BaseIdentity("tiny", None, given.version.manifest.base.fingerprint, "nf4")).write(config)
    assert hub.push(config, "b").version.manifest.base.quantization == "nf4"
    assert hub.push(config, "c", base=str(base)).version.manifest.base.quantization == "nf4"


def test_a_base_that_contradicts_the_training_record_is_refused(hub: Hub, tmp_path: Path) -> None:
    Facts(base=BaseIdentity("tiny", None, "sha256:" + "00" * 32)).write(adapter(tmp_path, 1))
    with pytest.raises(BaseMismatch):
        hub.push(tmp_path / "adapter-1", "x", base=str(write_base(tmp_path / "base")))


def test_an_adapter_that_does_nothing_is_taken_with_a_warning(hub: Hub, tmp_path: Path) -> None:
    silent = {
        name: (dtype, shape, b"\0" * len(raw) if "lora_B" in name else raw)
        for name, (dtype, shape, raw) in lora_tensors().items()
    }
    result = hub.push(write_adapter(tmp_path / "a", tensors=silent), "x")
    assert "changes nothing" in result.warnings[0]
    assert result.version.manifest.lora.changes_nothing


def test_compare_and_swap_on_aliases(hub: Hub, tmp_path: Path) -> None:
    for seed in (1, 2):
        hub.push(adapter(tmp_path, seed), "x")
    hub.tag("x@1", "prod", expect=0)
    with pytest.raises(AliasMoved, match="holds version 1, you expected it not to exist"):
        hub.tag("x@2", "prod", expect=0)
    with pytest.raises(AliasMoved, match="holds version 1, you expected version 2"):
        hub.untag("x", "prod", expect=2)
    hub.tag("x@2", "prod", expect=1)
    generation = hub.aliases("x")["prod"].generation
    hub.untag("x", "prod", expect=2)
    with pytest.raises(AliasMoved, match="does not exist"):
        hub.tag("x@1", "prod", expect=2)
    with pytest.raises(AliasNotFound):
        hub.untag("x", "prod")
    hub.tag("x@2", "prod")
    assert hub.aliases("x")["prod"].generation > generation


def test_moving_an_alias_to_where_it_is_says_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.push(adapter(tmp_path, 1), "x:prod")
    before = hub.last_seq()
    hub.tag("x:latest", "prod")
    assert hub.last_seq() == before


def test_the_journal_has_every_change_in_order(hub: Hub, tmp_path: Path) -> None:
    hub.push(adapter(tmp_path, 1), "x:prod")
    hub.push(adapter(tmp_path, 2), "x")
    hub.tag("x:latest", "prod")
    hub.untag("x", "prod")
    told = [(event.seq, event.kind, event.alias, event.version) for event in hub.events(0)]
    assert told == [
        (1, "push", None, 1), (2, "tag", "latest", 1), (3, "tag", "prod", 1), (4, "push", None, 2),
        (5, "tag", "latest", 2), (6, "tag", "prod", 2), (7, "untag", "prod", 2),
    ]  # fmt: skip
    assert [event.seq for event in hub.events(3, limit=2)] == [4, 5]
    assert hub.last_seq() == 7


def test_a_watcher_sees_what_was_and_what_comes(hub: Hub, tmp_path: Path) -> None:
    hub.push(adapter(tmp_path, 1), "x")
    stop, seen, two, five = threading.Event(), list[Event](), threading.Event(), threading.Event()

    def watch() -> None:
        for event in hub.watch(0, stop, poll_seconds=0.01):
            seen.append(event)
            if event.seq == 2:
                two.set()
            if event.seq == 5:
                five.set()

    thread = threading.Thread(target=watch)
    thread.start()
    assert two.wait(10)
    hub.push(adapter(tmp_path, 2), "x:prod")
    assert five.wait(10)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert [event.seq for event in seen] == [1, 2, 3, 4, 5]


def test_pull_gives_back_the_bytes_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    hub.push(adapter(tmp_path, 1), "x")
    (tmp_path / "empty").mkdir()
    for target in ("empty", "a/b/new"):
        assert hub.pull("x", tmp_path / target).text == "x@1"
        pulled = {path.name: path.read_bytes() for path in (tmp_path / target).iterdir()}
        assert pulled == {path.name: path.read_bytes() for path in (tmp_path / "adapter-1").iterdir()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_pull_touches_nothing_that_is_there(hub: Hub, tmp_path: Path) -> None:
    hub.push(adapter(tmp_path, 1), "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target in ("mine", "mine/thesis.txt", "link"):
        with pytest.raises(TargetNotEmpty):
            hub.pull("x", tmp_path / target)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_read_file_takes_a_version_or_its_digest(hub: Hub, tmp_path: Path) -> None:
    version = hub.push(adapter(tmp_path, 1), "x").version
    config = (tmp_path / "adapter-1" / "adapter_config.json").read_bytes()
    assert hub.read_file(version, "adapter_config.json") == config
    assert hub.read_file(version.digest, "adapter_config.json") == config
    for name in ("README.md", "../catalog.sqlite"):
        with pytest.raises(FileNotInVersion):
            hub.read_file(version, name)


def test_versions_are_filtered_by_pattern(hub: Hub, tmp_path: Path) -> None:
    for name in ("team/a", "team/b", "solo"):
        hub.push(adapter(tmp_path, 1), name)
    hub.push(adapter(tmp_path, 2), "team/a")
    assert [version.text for version in hub.versions()] == ["solo@1", "team/a@1", "team/a@2", "team/b@1"]
    assert [version.text for version in hub.versions("team/*")] == ["team/a@1", "team/a@2", "team/b@1"]
    assert [version.text for version in hub.versions("solo")] == ["solo@1"]


def test_one_hub_serves_many_threads(hub: Hub, tmp_path: Path) -> None:
    directories = [adapter(tmp_path, seed) for seed in range(6)]
    threads = [threading.Thread(target=hub.push, args=(directory, "x")) for directory in directories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [version.number for version in hub.versions()] == [1, 2, 3, 4, 5, 6]
    assert hub.verify() == []


@pytest.mark.parametrize("url", ["s3://bucket/x", "http://h/x", "file://host/x", "file:///"])
def test_other_urls_are_refused_for_now(url: str) -> None:
    with pytest.raises(HubUnavailable):
        Hub.open(url)


def test_what_is_done_where_the_hub_lies_is_refused_over_a_server() -> None:
    with pytest.raises(HubUnavailable, match="address of a server"):
        rebuild("grpcs://hub.example.org")


def test_a_hub_is_found_by_url_path_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hub.open((tmp_path / "a b").as_uri()) as hub:
        hub.push(adapter(tmp_path, 1), "x")
    monkeypatch.setenv("LORAPLEX_HUB", str(tmp_path / "a b"))
    with Hub.open() as hub:
        assert hub.resolve("x").number == 1


def test_a_hub_is_not_made_among_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(HubUnavailable, match="holds other things"):
        Hub.open(str(tmp_path))


def test_a_hub_of_another_format_is_not_touched(tmp_path: Path) -> None:
    Hub.open(str(tmp_path / "hub")).close()
    (tmp_path / "hub" / "FORMAT").write_text("loraplex hub 7\n")
    with pytest.raises(HubUnavailable, match="loraplex hub 7"):
        Hub.open(str(tmp_path / "hub"))


def test_the_manifest_holds_no_path_of_this_machine(hub: Hub, tmp_path: Path) -> None:
    version = hub.push(adapter(tmp_path, 1), "x", base=str(write_base(tmp_path / "base"))).version
    assert str(tmp_path) not in json.dumps(version.manifest.to_json())
