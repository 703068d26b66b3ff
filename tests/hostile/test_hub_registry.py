"""Rows 10, 11, 12 and 25 at the shared hub's door: any client can send anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from hub.errors import AliasMoved, HubError
from hub.hub import Hub
from hub.registry.grants import Grant
from hub.registry.server import RegistryConfig, RegistryServer
from hub.registry.tokens import TokenStore
from hub.remote.address import Address
from hub.remote.cache import Cache
from hub.remote.connection import Connection
from hub.remote.remote_hub import RemoteHub
from protos.loraplex.v1 import registry_pb2 as pb
from tests.hostile.test_hub_refs import ROW_10, ROW_12
from tests.hub.making import lora_tensors, write_adapter

# What protobuf itself refuses to carry is not sent.
SENT = [text for text in ROW_10 if len(text) < 1000 and text.isprintable()]


class World:
    def __init__(self, store: Hub, tokens: TokenStore, server: RegistryServer, tmp_path: Path) -> None:
        self.store, self.tokens, self.server, self.tmp_path = store, tokens, server, tmp_path
        self.made = 0

    def client(self, *grants: str) -> RemoteHub:
        self.made += 1
        _, token = self.tokens.create("ada", [Grant.parse(grant) for grant in grants])
        address = Address.parse(f"grpc://{self.server.address}")
        return RemoteHub(Connection(address, token, patience_seconds=3), Cache(self.tmp_path / f"c{self.made}"))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with Hub.open(str(tmp_path / "hub")) as store:
        store.push(write_adapter(tmp_path / "a"), "team/x")
        tokens = TokenStore(store.database)
        config = RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")
        with RegistryServer(store, tokens, config) as server:
            yield World(store, tokens, server, tmp_path)


def doors(text: str) -> dict[str, Any]:
    """Every call that takes a reference, with `text` in its place."""
    target = pb.TagRequest.Target(ref=text, weight=1)
    file = pb.PushedFile(name="README.md", sha256="sha256:" + "0" * 64, bytes=1)
    return {
        "Resolve": pb.ResolveRequest(ref=text),
        "Lineage": pb.LineageRequest(ref=text),
        "Aliases": pb.AliasesRequest(full_name=text),
        "BeginPush": pb.BeginPushRequest(ref=text),
        "Publish": pb.PublishRequest(ref=text),
        "Tag": pb.TagRequest(targets=[target], alias="prod"),
        "Promote": pb.PromoteRequest(ref=text, alias="prod"),
        "Rollback": pb.AliasRequest(full_name=text, alias="prod"),
        "Untag": pb.AliasRequest(full_name=text, alias="prod"),
        "Remove": pb.RefRequest(ref=text),
        "Restore": pb.RefRequest(ref=text),
        "TakeLease": pb.LeaseRequest(ref=text, holder="h"),
        "ReleaseLease": pb.LeaseRequest(ref=text, holder="h"),
        "ListLeases": pb.ListLeasesRequest(full_name=text),
        "Events": pb.EventsRequest(full_name=text, limit=1),
        "Check": pb.CheckRequest(kind=pb.CheckRequest.KIND_VERIFY, ref=text),
        "Upload": iter([pb.UploadRequest(begin=pb.UploadRequest.Begin(ref=text, file=file))]),
    }


def reason_of(hub: RemoteHub, method: str, request: Any) -> str:
    try:
        answer = getattr(hub.connection.stub, method)(request, metadata=hub.connection.metadata(None), timeout=10)
        if hasattr(answer, "__iter__") or hasattr(answer, "__next__"):
            list(answer)
    except grpc.RpcError as error:
        found = dict(error.trailing_metadata())  # type: ignore[attr-defined]
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        return str(found.get("loraplex-reason"))
    return "OK"


def test_row_10_every_call_refuses_what_is_no_reference(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = world.client("*:admin")
    seq = world.store.last_seq()
    for door in ("service.RegistryService._readable", "pushing.one_of", "adopt_call.one_of"):
        monkeypatch.setattr(f"hub.registry.{door}", lambda *a, **k: pytest.fail("looked at"))
    for text in SENT:
        for method, request in doors(text).items():
            assert reason_of(hub, method, request) == "REF_INVALID", (method, text)
    assert world.store.last_seq() == seq
    assert list((world.tmp_path / "uploads").rglob("*")) == []


def test_row_12_every_call_refuses_what_is_no_digest(world: World) -> None:
    hub = world.client("*:admin")
    for text in ROW_12:
        if not text.isprintable():
            continue
        file = pb.PushedFile(name="README.md", sha256=text, bytes=1)
        for method, request in {
            "GetVersion": pb.GetVersionRequest(digest=text),
            "ReadFile": pb.ReadFileRequest(digest=text, filename="adapter_config.json"),
            "Sign": pb.SignRequest(digest=text, signature=b"{}"),
            "Signatures": pb.SignaturesRequest(digest=text),
            "AddEvaluation": pb.AddEvaluationRequest(digest=text),
            "ListEvaluations": pb.ListEvaluationsRequest(digest=text),
            "BeginPush": pb.BeginPushRequest(ref="team/x", files=[file]),
            "Publish": pb.PublishRequest(ref="team/x", files=[file]),
        }.items():
            assert reason_of(hub, method, request) == "REF_INVALID", (method, text)
    assert list((world.tmp_path / "uploads").rglob("*")) == []


def test_row_11_another_tenants_adapter_sounds_as_one_that_is_not_there(world: World) -> None:
    """Word for word: who lacks the role learns nothing, and a digest of another tenant's is not found."""
    hub = world.client("mine:admin")
    there = world.store.resolve("team/x")

    def said(call: Callable[[], object]) -> tuple[str, str]:
        with pytest.raises(HubError) as refused:
            call()
        return refused.value.reason, str(refused.value)

    for pair in (
        (lambda: hub.resolve("team/x"), lambda: hub.resolve("team/nothing")),
        (lambda: hub.aliases("team/x"), lambda: hub.aliases("team/nothing")),
        (lambda: hub.remove("team/x@1"), lambda: hub.remove("team/x@9")),
        (lambda: hub.tag("team/x", "prod"), lambda: hub.tag("team/nothing", "prod")),
    ):
        assert said(pair[0]) == said(pair[1])
    zeros = "sha256:" + "0" * 64
    for call in (hub.get, hub.signatures, hub.evaluations):
        mine, unknown = said(lambda call=call: call(there.digest)), said(lambda call=call: call(zeros))  # type: ignore[misc]
        assert mine[0] == unknown[0] == "ADAPTER_NOT_FOUND"
        assert mine[1].replace(there.digest, zeros) == unknown[1]


def test_row_25_pushes_and_swaps_race_over_the_wire(world: World) -> None:
    clients = [world.client("*:push,promote") for _ in range(6)]
    same = write_adapter(world.tmp_path / "same", tensors=lora_tensors(seed=7))
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda hub: hub.push(same, "team/y"), clients))
    assert {result.version.number for result in results} == {1}
    assert sorted(result.created for result in results) == [False] * 5 + [True]
    for seed in range(4):
        world.store.push(write_adapter(world.tmp_path / f"v{seed}", tensors=lora_tensors(seed=seed)), "team/z")
    world.store.tag("team/z@1", "prod")

    def swap(number: int) -> str:
        try:
            clients[number].tag(f"team/z@{number}", "prod", expect=1)
        except AliasMoved as error:
            return error.reason
        return "moved"

    with ThreadPoolExecutor(3) as pool:
        outcomes = sorted(pool.map(swap, (2, 3, 4)))
    assert outcomes == ["ALIAS_MOVED", "ALIAS_MOVED", "moved"]
    assert world.store.fsck() == []
