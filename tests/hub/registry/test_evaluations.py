"""Evaluations on a shared hub: who may, what is refused at the door, and a server that does not know them."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from hub import json_text
from hub.cli import group
from hub.errors import (
    AdapterNotFound,
    BlobCorrupt,
    EvaluationRefused,
    EvaluationsUnsupported,
    Forbidden,
    GateRefused,
    HubError,
    Unauthenticated,
)
from hub.evaluation import MAX_RECORD_BYTES
from hub.gate import Gate
from hub.hub import Hub
from hub.refs import Digest
from hub.registry.grants import Grant
from hub.registry.server import RegistryServer
from hub.registry.tokens import TokenStore
from hub.remote.address import Address
from hub.remote.cache import Cache
from hub.remote.connection import Connection
from hub.remote.remote_hub import RemoteHub
from hub.versions import Version
from protos.loraplex.v1 import registry_pb2 as pb
from tests.hub.making import write_adapter
from tests.hub.registry.conftest import ConnectAs
from tests.hub.test_evaluations import scored

GATE = Gate.parse(b'require = ["sentiment.accuracy >= 0.6"]')


@pytest.fixture
def version(store: Hub, tmp_path: Path) -> Version:
    return store.push(write_adapter(tmp_path / "a"), "team/x").version


def test_who_may_push_adds_and_who_may_read_reads(connect: ConnectAs, store: Hub, version: Version) -> None:
    for grants in (("team:read",), ("team:promote",), ("team:read", "other:push"), ("*:read", ".:admin")):
        with pytest.raises(Forbidden, match="'push' for the namespace team"):
            connect(*grants).add_evaluation(scored(version))
    for grants in (("other:admin",), (".:admin",)):
        with pytest.raises(AdapterNotFound):
            connect(*grants).add_evaluation(scored(version))
        with pytest.raises(AdapterNotFound):
            connect(*grants).evaluations(version.digest)
    for call in (lambda hub: hub.add_evaluation(scored(version)), lambda hub: hub.evaluations(version.digest)):
        with pytest.raises(Unauthenticated):
            call(connect())
    assert store.evaluations(version.digest) == []
    kept = connect("team:push", subject="bob").acting_as("the nightly run").add_evaluation(scored(version))
    assert kept.by == "bob for the nightly run"
    assert connect("team:admin").add_evaluation(scored(version)).by == "ada"
    found = connect("team:read").evaluations(version.digest)
    assert found == store.evaluations(version.digest) and [each.by for each in found] == [kept.by, "ada"]


def test_a_gate_on_the_server_asks_for_what_was_recorded(connect: ConnectAs, store: Hub, version: Version) -> None:
    hub = connect("team:promote")
    with pytest.raises(GateRefused, match="not recorded"):
        hub.promote(version.text, "prod", GATE)
    connect("team:push").add_evaluation(scored(version, accuracy=0.5))
    with pytest.raises(GateRefused, match=r"sentiment\.accuracy 0\.5 >= 0\.6"):
        hub.promote(version.text, "prod", GATE)
    assert "prod" not in store.aliases("team/x")
    connect("team:push").add_evaluation(scored(version, accuracy=0.7))
    assert hub.promote(version.text, "prod", GATE).passed == ("sentiment.accuracy 0.7 >= 0.6",)
    assert store.aliases("team/x")["prod"].version == 1


def sent(version: Version, **changes: Any) -> bytes:
    """A record's bytes, right or wrong."""
    value = json.loads(scored(version).encode()) | changes
    return json.dumps({key: item for key, item in value.items() if item is not ...}).encode()


HOSTILE: dict[str, Callable[[Version], bytes]] = {
    "nothing": lambda version: b"",
    "no JSON": lambda version: b"\x80",
    "a list": lambda version: b"[]",
    "too long": lambda version: sent(version, task="a" * MAX_RECORD_BYTES),
    "too deep": lambda version: sent(version, data=json.loads('{"a":' * 40 + "1" + "}" * 40)),
    "another schema": lambda version: sent(version, schema="loraplex.evaluation/2"),
    "a key too few": lambda version: sent(version, base=...),
    "a key too many": lambda version: sent(version, path="../../etc/passwd"),
    "a key twice": lambda version: sent(version).replace(b'"task":', b'"task": "x", "task":'),
    "of another version": lambda version: sent(version, digest="sha256:" + "0" * 64),
    "no digest": lambda version: sent(version, digest="../.."),
    "a digest that is no text": lambda version: sent(version, digest=7),
    "infinite": lambda version: sent(version).replace(b'"accuracy": 0.5', b'"accuracy": 1e999'),
    "NaN": lambda version: sent(version).replace(b'"accuracy": 0.5', b'"accuracy": NaN'),
    "a truth": lambda version: sent(version, metrics={"accuracy": True}),
    "a number as text": lambda version: sent(version, metrics={"accuracy": "0.9"}),
    "a huge integer": lambda version: sent(version, metrics={"accuracy": 10**400}),
    "no metrics": lambda version: sent(version, metrics={}, intervals={}),
    "metrics that are none": lambda version: sent(version, metrics=[1]),
    "too many metrics": lambda version: sent(version, metrics={f"m{n}": 1 for n in range(300)}, intervals={}),
    "a name with an escape": lambda version: sent(version, metrics={"\x1b]0;x\x07": 1}, intervals={}),
    "an empty name": lambda version: sent(version, metrics={"": 1}, intervals={}),
    "a name too long": lambda version: sent(version, metrics={"m" * 200: 1}, intervals={}),
    "a task over two lines": lambda version: sent(version, task="a\nb"),
    "no task": lambda version: sent(version, task=""),
    "an interval of three": lambda version: sent(version, intervals={"accuracy": [1, 2, 3]}),
    "an interval that is none": lambda version: sent(version, intervals={"accuracy": 1}),
    "an interval the wrong way round": lambda version: sent(version, intervals={"accuracy": [2, 1]}),
    "intervals of nothing": lambda version: sent(version, intervals={"other": [1, 2]}),
    "minus one example": lambda version: sent(version, data={"digest": "d", "examples": -1}),
    "half an example": lambda version: sent(version, data={"digest": "d", "examples": 0.5}),
    "data that is none": lambda version: sent(version, data=None),
    "a base with more": lambda version: sent(version, base={"name": "b", "quantization": "none", "x": {}}),
    "a base that is no text": lambda version: sent(version, base={"name": ["b"], "quantization": "none"}),
    "half a surrogate": lambda version: sent(version, task="\ud800"),
    "a time that is none": lambda version: sent(version, at="tomorrow"),
}


def test_hostile_records_are_refused_and_never_kept(connect: ConnectAs, store: Hub, version: Version) -> None:
    hub = connect("*:push")
    for what, make in HOSTILE.items():
        request = pb.AddEvaluationRequest(digest=version.digest, record=pb.EvaluationRecord(json=make(version)))
        refused: Exception | None = None
        try:
            hub.connection.call("AddEvaluation", request)
        except HubError as error:
            refused = error
        assert isinstance(refused, EvaluationRefused), what
        assert isinstance(refused.__cause__, grpc.Call), what
        assert refused.__cause__.code() is grpc.StatusCode.INVALID_ARGUMENT, what
    for digest in ("", "sha256:../..", "0" * 64):
        for method, ask in (
            ("AddEvaluation", pb.AddEvaluationRequest(digest=digest, record=pb.EvaluationRecord(json=sent(version)))),
            ("ListEvaluations", pb.ListEvaluationsRequest(digest=digest)),
        ):
            with pytest.raises(HubError) as wrong:
                list(hub.connection.stream(method, ask)) if method[0] == "L" else hub.connection.call(method, ask)
            assert wrong.value.reason == "REF_INVALID"
    with pytest.raises(EvaluationRefused):
        hub.connection.call("AddEvaluation", pb.AddEvaluationRequest(digest=version.digest))
    assert store.evaluations(version.digest) == [] and store.fsck() == []
    # What the above are changes of is taken, but not what it says of itself.
    good = json_text.canonical({**json.loads(sent(version)), "version": "evil/y@7", "by": "root"})
    request = pb.AddEvaluationRequest(digest=version.digest, record=pb.EvaluationRecord(json=good))
    hub.connection.call("AddEvaluation", request)
    [kept] = store.evaluations(version.digest)
    assert (kept.version, kept.by, kept) == ("team/x@1", "ada", replace(scored(version), at=kept.at, by="ada"))


def test_a_server_that_answers_with_another_versions_scores_is_not_believed(
    connect: ConnectAs, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(scored(version), digest=Digest.of_hex("0" * 64))
    monkeypatch.setattr(Hub, "evaluations", lambda self, digest: [other])
    monkeypatch.setattr(Hub, "add_evaluation", lambda self, found: other)
    hub = connect("team:push")
    for call in (lambda: hub.evaluations(version.digest), lambda: hub.add_evaluation(scored(version))):
        with pytest.raises(BlobCorrupt, match="when asked for"):
            call()


def test_many_records_come_in_parts(
    connect: ConnectAs, store: Hub, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.registry.parts.PART_BYTES", 1000)
    for number in range(12):
        store.add_evaluation(scored(version, accuracy=number / 12))
    hub = connect("team:read")
    request = pb.ListEvaluationsRequest(digest=version.digest)
    assert len(list(hub.connection.stream("ListEvaluations", request))) > 3
    assert hub.evaluations(version.digest) == store.evaluations(version.digest)


def test_the_verbs_on_a_shared_hub(
    server: RegistryServer, tokens: TokenStore, version: Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"grpc://{server.address}"
    token = tokens.create("ada", [Grant.parse("team:push,promote")])[1]
    monkeypatch.setenv("LORAPLEX_HUB_TOKEN", token)
    with RemoteHub.open(url) as hub:
        hub.add_evaluation(scored(version, accuracy=0.7))
    shown = CliRunner().invoke(group, ["show", "team/x@1", "--hub", url, "--json"], catch_exceptions=False)
    assert [each["metrics"] for each in json.loads(shown.output)["evaluations"]] == [{"accuracy": 0.7}]
    gate = tmp_path / "gate.toml"
    gate.write_text('require = ["sentiment.accuracy >= 0.6"]')
    words = ["promote", "team/x@1", "prod", "--gate", str(gate), "--hub", url]
    done = CliRunner().invoke(group, words, catch_exceptions=False)
    assert "sentiment.accuracy 0.7 >= 0.6" in done.output


def test_a_server_of_an_older_release_is_told_of_and_its_versions_are_shown(tmp_path: Path) -> None:
    older = grpc.server(futures.ThreadPoolExecutor(2))  # which knows no call at all
    port = older.add_insecure_port("127.0.0.1:0")
    older.start()
    try:
        with Hub.open(str(tmp_path / "hub")) as local:
            version = local.push(write_adapter(tmp_path / "a"), "team/x").version
        connection = Connection(Address.parse(f"grpc://127.0.0.1:{port}"), None)
        with RemoteHub(connection, Cache(tmp_path / "client")) as hub:
            for call in (lambda: hub.add_evaluation(scored(version)), lambda: hub.evaluations(version.digest)):
                with pytest.raises(EvaluationsUnsupported, match="update it"):
                    call()
            with pytest.raises(HubError, match="release is older") as refused:
                hub.resolve("team/x")
            assert refused.value.reason == "HUB_UNAVAILABLE"
    finally:
        older.stop(0)


def test_show_leaves_out_what_an_older_server_does_not_know(
    server: RegistryServer, tokens: TokenStore, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAPLEX_HUB_TOKEN", tokens.create("ada", [Grant.parse("team:read")])[1])

    def unknown(self: RemoteHub, digest: object) -> None:
        raise EvaluationsUnsupported("old")

    monkeypatch.setattr(RemoteHub, "evaluations", unknown)
    words = ["show", "team/x@1", "--hub", f"grpc://{server.address}", "--json"]
    shown = CliRunner().invoke(group, words, catch_exceptions=False)
    assert json.loads(shown.output)["evaluations"] == []
