"""Names → digests: remembered, followed, and honest when the hub is away."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hub.errors import AdapterNotFound, HubUnavailable
from hub.refs import AdapterRef
from server.adapters.directory import AdapterDirectory
from tests.server.api.fakes import FakeHub, FakeVersion
from tests.waiting import eventually


@pytest.fixture
def directory(fake_hub: FakeHub) -> Iterator[AdapterDirectory]:
    directory = AdapterDirectory(fake_hub, poll_seconds=0.01)
    yield directory
    directory.close()


def ref(text: str) -> AdapterRef:
    return AdapterRef.parse(text)


def test_known_names_cost_no_query(directory: AdapterDirectory, fake_hub: FakeHub) -> None:
    assert directory.cached(ref("team/a:prod")) is None
    found = directory.resolve(ref("team/a:prod"))
    assert (found.version, found.digest) == ("team/a@1", fake_hub.versions["team/a"][0])
    asked = fake_hub.asked
    assert directory.cached(ref("team/a:prod")) == directory.resolve(ref("team/a:prod")) == found
    assert directory.resolve(ref("team/b")).version == directory.resolve(ref("team/b:latest")).version == "team/b@1"
    assert fake_hub.asked == asked + 1


def test_a_moved_alias_is_seen_and_pinned_names_stay(directory: AdapterDirectory, fake_hub: FakeHub) -> None:
    for name in ("team/a:prod", "team/a@1", "team/b"):
        directory.resolve(ref(name))
    fake_hub.tag("team/a", "prod", 2)
    assert eventually(lambda: directory.resolve(ref("team/a:prod")).version == "team/a@2")
    asked = fake_hub.asked
    assert directory.resolve(ref("team/a@1")).version == "team/a@1"
    assert directory.resolve(ref("team/b")).version == "team/b@1"
    assert fake_hub.asked == asked  # neither was forgotten


def test_a_push_moves_latest(directory: AdapterDirectory, fake_hub: FakeHub) -> None:
    assert directory.resolve(ref("team/a")).version == "team/a@2"
    fake_hub.push("team/a")
    assert eventually(lambda: directory.resolve(ref("team/a")).version == "team/a@3")


def test_an_untagged_alias_is_gone(directory: AdapterDirectory, fake_hub: FakeHub) -> None:
    directory.resolve(ref("team/a:prod"))
    fake_hub.untag("team/a", "prod")
    assert eventually(lambda: directory.cached(ref("team/a:prod")) is None)
    with pytest.raises(AdapterNotFound, match=r"^no adapter team/a:prod$"):
        directory.resolve(ref("team/a:prod"))


def test_an_unknown_kind_of_event_forgets_pinned_names_too(directory: AdapterDirectory, fake_hub: FakeHub) -> None:
    directory.resolve(ref("team/b@1"))
    fake_hub.remove("team/b")
    assert eventually(lambda: directory.cached(ref("team/b@1")) is None)


def test_while_the_hub_is_away_known_names_work(directory: AdapterDirectory, fake_hub: FakeHub) -> None:
    directory.resolve(ref("team/a:prod"))
    fake_hub.unreachable = True
    assert directory.resolve(ref("team/a:prod")).version == "team/a@1"
    with pytest.raises(HubUnavailable):
        directory.resolve(ref("team/b"))
    fake_hub.tag("team/a", "prod", 2)
    fake_hub.unreachable = False
    assert eventually(lambda: directory.resolve(ref("team/a:prod")).version == "team/a@2")


def test_a_hub_that_is_away_at_the_start_is_said(fake_hub: FakeHub) -> None:
    fake_hub.unreachable = True
    with pytest.raises(HubUnavailable):
        AdapterDirectory(fake_hub)


def test_an_answer_overtaken_by_an_event_is_not_kept(fake_hub: FakeHub) -> None:
    """The alias moves between the hub's answer and its storing: the old answer must not be remembered."""
    read, go_on = threading.Event(), threading.Event()

    class SlowHub(FakeHub):
        def resolve(self, asked: AdapterRef) -> FakeVersion:
            answer = super().resolve(asked)
            read.set()
            assert go_on.wait(30)
            return answer

    slow = SlowHub(fake_hub.versions, fake_hub.held)
    directory = AdapterDirectory(slow, poll_seconds=0.01)
    try:
        thread = threading.Thread(target=directory.resolve, args=(ref("team/a:prod"),))
        thread.start()
        assert read.wait(30)
        slow.tag("team/a", "prod", 2)
        assert eventually(lambda: directory._moves == 1)
        go_on.set()
        thread.join()
        assert directory.resolve(ref("team/a:prod")).version == "team/a@2"
    finally:
        go_on.set()
        directory.close()


def test_the_cache_is_bounded(fake_hub: FakeHub) -> None:
    directory = AdapterDirectory(fake_hub, poll_seconds=0.01, max_names=2)
    try:
        for name in ("team/a@1", "team/a@2", "team/b@1"):
            directory.resolve(ref(name))
        assert directory.cached(ref("team/a@1")) is None
        assert directory.cached(ref("team/b@1")) is not None
        assert directory.version_of(fake_hub.versions["team/b"][0]) == "team/b@1"
    finally:
        directory.close()


def test_following_a_real_hub(tmp_path: Path, pushed: Callable[..., None]) -> None:
    """The same through hub.hub on disk: push, tag, and the files of a version."""
    from hub.facts import Facts
    from hub.hub import Hub
    from server.adapters.directory import hub_fetch

    with Hub.open(str(tmp_path / "hub")) as hub:
        pushed(hub, "team/x", seed=1)
        directory = AdapterDirectory(hub, poll_seconds=0.01)
        try:
            first = directory.resolve(ref("team/x"))
            pushed(hub, "team/x", seed=2)
            assert eventually(lambda: directory.resolve(ref("team/x")).version == "team/x@2")
            assert directory.resolve(ref(f"team/x@{first.digest}")).version == "team/x@1"
            files = hub_fetch(hub)(first.digest)
            assert not files.corrects_nf4
            assert files.digest == first.digest and files.config.startswith(b"{") and len(files.weights) > 100
            Facts(recipe={"init": "qera"}).write(tmp_path / "team-x-2")
            third = hub.push(tmp_path / "team-x-2", "team/x").version
            assert hub_fetch(hub)(third.digest).corrects_nf4
            with pytest.raises(AdapterNotFound):
                directory.resolve(ref("team/nobody"))
        finally:
            directory.close()


def test_a_split_alias_is_resolved_by_the_callers_key(fake_hub: FakeHub) -> None:
    from hub.canary import pick

    fake_hub.split("team/a", "prod", {1: 9, 2: 1})
    directory = AdapterDirectory(fake_hub, poll_seconds=0.01)
    try:
        assert directory.cached(ref("team/a:prod"), "me") is None
        targets = fake_hub.aliases("team/a")["prod"].targets
        keys = [f"user-{number}" for number in range(200)]
        got = {key: directory.resolve(ref("team/a:prod"), key).version for key in keys}
        assert got == {key: f"team/a@{pick(targets, 'team/a', 'prod', key).version}" for key in keys}
        assert set(got.values()) == {"team/a@1", "team/a@2"}
        asked = fake_hub.asked
        assert {key: directory.resolve(ref("team/a:prod"), key).version for key in keys} == got
        assert fake_hub.asked == asked  # however many keys: the alias was asked for once
        # Without a key the heaviest; a number is a number whatever the key.
        assert directory.resolve(ref("team/a:prod")).version == "team/a@1"
        assert {directory.resolve(ref("team/a@2"), key).version for key in keys} == {"team/a@2"}
        fake_hub.split("team/a", "prod", {1: 5, 2: 5})
        assert eventually(
            lambda: (
                {directory.resolve(ref("team/a:prod"), key).version for key in keys}
                and len([k for k in keys if directory.resolve(ref("team/a:prod"), k).version == "team/a@2"]) > 60
            )
        )
        # Who had the growing version keeps it.
        moved = {key: directory.resolve(ref("team/a:prod"), key).version for key in keys}
        assert all(moved[key] == "team/a@2" for key in keys if got[key] == "team/a@2")
        fake_hub.unreachable = True
        assert {key: directory.resolve(ref("team/a:prod"), key).version for key in keys} == moved
        fake_hub.unreachable = False
        fake_hub.untag("team/a", "prod")
        assert eventually(lambda: directory.cached(ref("team/a:prod"), "me") is None)
        for name in ("team/a:prod", "team/nobody:prod"):
            with pytest.raises(AdapterNotFound, match=f"^no adapter {name}$"):
                directory.resolve(ref(name), "me")
    finally:
        directory.close()
