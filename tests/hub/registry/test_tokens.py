"""Who may do what: every verb for every role, namespaces, and tokens that are good no more."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa
from google.rpc import error_details_pb2, status_pb2

from hub import sqlite
from hub.errors import AdapterNotFound, Forbidden, GrantInvalid, HubError, HubReadOnly, TokenNotFound, Unauthenticated
from hub.gate import Gate
from hub.hub import Hub
from hub.refs import Digest
from hub.registry.grants import Grant
from hub.registry.server import RegistryServer
from hub.registry.tokens import TokenStore
from hub.remote.remote_hub import RemoteHub
from hub.remote.token_admin import RemoteTokens
from hub.search import MetricTest, Query
from protos.loraplex.v1 import registry_pb2, registry_pb2_grpc
from tests.hub.making import lora_tensors, write_adapter
from tests.hub.registry.conftest import ConnectAs

ROLES = ("read", "push", "promote", "admin")
GATE = Gate(require=(MetricTest("f1", ">=", 0.5),))


def adapter(tmp_path: Path, seed: int) -> Path:
    return write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))


def digest_of(hub: Hub) -> Digest:
    return hub.resolve("team/x@1").digest


VERBS: dict[str, tuple[set[str], Callable[[RemoteHub, Path], object]]] = {
    "resolve": (set(ROLES), lambda hub, tmp: hub.resolve("team/x")),
    "pull": (set(ROLES), lambda hub, tmp: hub.pull("team/x", tmp / "out")),
    "aliases": (set(ROLES), lambda hub, tmp: hub.aliases("team/x")),
    "lineage": (set(ROLES), lambda hub, tmp: hub.lineage("team/x")),
    "events": (set(ROLES), lambda hub, tmp: hub.events(full_name="team/x")),
    "leases": (set(ROLES), lambda hub, tmp: hub.leases("team/x")),
    "verify": (set(ROLES), lambda hub, tmp: hub.verify("team/x")),
    "diff": (set(ROLES), lambda hub, tmp: hub.diff("team/x@1", "team/x@2")),
    "push": ({"push", "admin"}, lambda hub, tmp: hub.push(adapter(tmp, 9), "team/x")),
    "lease": (set(ROLES), lambda hub, tmp: hub.lease("team/x", "me", 60)),
    "pin": ({"push", "admin"}, lambda hub, tmp: hub.lease("team/x", "me")),
    "release": (set(ROLES), lambda hub, tmp: hub.release("team/x", "me")),
    "tag": ({"promote", "admin"}, lambda hub, tmp: hub.tag("team/x@1", "prod")),
    "split": ({"promote", "admin"}, lambda hub, tmp: hub.split([("team/x@1", 1), ("team/x@2", 1)], "prod")),
    "untag": ({"promote", "admin"}, lambda hub, tmp: hub.untag("team/x", "old")),
    "rollback": ({"promote", "admin"}, lambda hub, tmp: hub.rollback("team/x", "old")),
    "promote": ({"promote", "admin"}, lambda hub, tmp: hub.promote("team/x@1", "prod", GATE)),
    "remove": ({"admin"}, lambda hub, tmp: hub.remove("team/x@3")),
    "restore": ({"admin"}, lambda hub, tmp: hub.restore("team/x@4")),
    "sweep": (set(), lambda hub, tmp: hub.sweep(dry_run=True)),  # of all namespaces: below
    "fsck": (set(), lambda hub, tmp: hub.fsck()),
    "verify all": (set(), lambda hub, tmp: hub.verify()),
    "tokens": (set(), lambda hub, tmp: RemoteTokens(hub).list()),
    "revoke": (set(), lambda hub, tmp: RemoteTokens(hub).revoke("00")),
    "make a token": (set(), lambda hub, tmp: RemoteTokens(hub).create("eve", [Grant.parse("*:admin")], None)),
}  # fmt: skip


@pytest.fixture
def filled(store: Hub, tmp_path: Path) -> Hub:
    for seed in (1, 2, 3, 4):
        store.push(adapter(tmp_path, seed), "team/x")
    store.push(adapter(tmp_path, 5), "other/y")
    store.push(adapter(tmp_path, 6), "plain")
    store.tag("team/x@3", "old")
    store.tag("team/x@1", "old")
    store.tag("team/x@2", "latest")
    store.remove("team/x@4")
    return store


@pytest.mark.parametrize("verb", VERBS)
def test_every_role_and_verb(verb: str, filled: Hub, connect: ConnectAs, tmp_path: Path) -> None:
    allowed, act = VERBS[verb]
    before = filled.last_seq()
    for role in ("read", "push", "promote", "admin"):
        if role not in allowed:
            with pytest.raises(Forbidden):
                act(connect(f"team:{role}"), tmp_path)
    with pytest.raises(Forbidden):
        act(connect("other:admin", ".:admin"), tmp_path)
    for nobody in (connect(), connect(token="lpt_" + "0" * 16 + "_" + "a" * 43), connect(token="nonsense")):
        with pytest.raises(Unauthenticated):
            act(nobody, tmp_path)
    assert filled.last_seq() == before, "a refused call wrote something"
    for role in sorted(allowed - {"admin"}) or ["admin"]:
        done = connect(f"team:{role}" if allowed else f"*:{role}")
        try:
            act(done, tmp_path / role)
        except Forbidden:
            raise
        except HubError as error:  # allowed, and then it is the hub's own word
            assert error.reason in ("GATE_REFUSED", "TOKEN_NOT_FOUND"), error


def test_other_aliases_than_latest_need_two_roles(filled: Hub, connect: ConnectAs, tmp_path: Path) -> None:
    for ref, aliases in (("team/x:prod", []), ("team/x", ["prod"])):
        with pytest.raises(Forbidden, match="promote"):
            connect("team:push").push(adapter(tmp_path, 9), ref, aliases=aliases)
    assert connect("team:push,promote").push(adapter(tmp_path, 9), "team/x:prod").version.number == 5
    with pytest.raises(Forbidden, match="promote"):  # known content still moves the alias: refused as well
        connect("team:push").push(adapter(tmp_path, 1), "team/x:prod")


def test_what_may_not_be_read_is_left_out_and_not_found(filled: Hub, connect: ConnectAs) -> None:
    reader = connect("team:read")
    assert {version.full_name for version in reader.versions()} == {"team/x"}
    assert {version.full_name for version in reader.search(Query(limit=2)).versions} == {"team/x"}
    first = reader.search(Query(limit=2))
    assert [len(first.versions), first.more] == [2, True]
    rest = reader.search(Query(limit=2, after=("team/x", 2)))
    assert [version.number for version in rest.versions] == [3]
    assert {event.full_name for event in reader.events()} == {"team/x"}
    hidden = filled.resolve("other/y").digest
    with pytest.raises(AdapterNotFound) as refused:
        reader.get(hidden)
    with pytest.raises(AdapterNotFound) as unknown:
        reader.get("sha256:" + "0" * 64)
    assert str(refused.value).replace(hidden, "") == str(unknown.value).replace("sha256:" + "0" * 64, "")
    with pytest.raises(Forbidden) as there:
        reader.resolve("other/y")
    with pytest.raises(Forbidden) as not_there:
        reader.resolve("other/nothing")
    assert str(there.value) == str(not_there.value)
    assert {version.full_name for version in connect(".:read").versions()} == {"plain"}


def test_a_digest_gives_nobody_the_bytes_of_others(filled: Hub, connect: ConnectAs) -> None:
    """Whoever only knows a file's digest still has to send the bytes."""
    pusher = connect("team:push")
    entry = filled.resolve("other/y").manifest.files["adapter_model.safetensors"]
    file = registry_pb2.PushedFile(name="adapter_model.safetensors", sha256=entry.sha256, bytes=entry.bytes)
    request = registry_pb2.BeginPushRequest(ref="team/x", files=[file])
    missing = pusher.connection.call("BeginPush", request).missing
    assert [each.name for each in missing] == ["adapter_model.safetensors"]


def test_tokens_end(filled: Hub, connect: ConnectAs, tokens: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, text = tokens.create("ci", [Grant.parse("*:read")])
    hub = connect(token=text)
    assert hub.resolve("team/x").number == 2
    tokens.revoke(kept.id, "ada")
    with pytest.raises(Unauthenticated, match="revoked"):
        hub.resolve("team/x")
    _, short = tokens.create("ci", [Grant.parse("*:read")], lifetime_seconds=0.05)
    threading.Event().wait(0.1)
    with pytest.raises(Unauthenticated, match="expired"):
        connect(token=short).resolve("team/x")
    with pytest.raises(Unauthenticated, match="not known"):  # a wrong secret learns nothing of the token
        connect(token=text[:-1] + ("a" if text[-1] != "a" else "b")).resolve("team/x")
    assert (tokens.list()[0].subject, tokens.list()[0].revoked_by) == ("ci", "ada")


def test_a_revoked_token_ends_its_watch(filled: Hub, connect: ConnectAs, tokens: TokenStore, tmp_path: Path) -> None:
    kept, text = tokens.create("ci", [Grant.parse("team:read")])
    watch = connect(token=text).watch(filled.last_seq(), threading.Event())
    filled.push(adapter(tmp_path, 20), "other/y")  # not for this caller
    filled.tag("team/x@3", "prod")
    assert next(watch).alias == "prod"
    tokens.revoke(kept.id)
    filled.tag("team/x@1", "prod")
    with pytest.raises(Unauthenticated):
        for _ in range(3):
            next(watch)


def test_the_audit_names_the_tokens_subject(store: Hub, connect: ConnectAs, tmp_path: Path) -> None:
    ci = connect("team:push,promote", subject="ci@example.org")
    ci.push(adapter(tmp_path, 1), "team/x", creator="somebody")
    ci.acting_as("grace").tag("team/x", "prod")
    assert [event.actor for event in store.events()] == ["ci@example.org"] * 2 + ["ci@example.org for grace"]


def test_only_salted_hashes_are_kept(store: Hub, tokens: TokenStore) -> None:
    secrets = [tokens.create("same", [Grant.parse("*:read")])[1] for _ in range(2)]
    with store.database.connect() as connection:
        rows = connection.execute(sa.text("SELECT * FROM registry_tokens")).all()
    assert len({row.salt for row in rows}) == len({row.hash for row in rows}) == 2
    for secret in secrets:
        assert secret.split("_", 2)[2] not in str(rows)


@pytest.mark.parametrize("subjects", [[], ["ada"]])
def test_a_hub_that_cannot_be_written_tells_its_tokens_and_makes_none(subjects: list[str], tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        made = [TokenStore(hub.database).create(subject, [Grant.parse("*:read")])[0] for subject in subjects]
    tokens = TokenStore(sqlite.open_for_reading(tmp_path / "hub" / "catalog.sqlite"))
    assert tokens.list() == made
    with pytest.raises(HubReadOnly):
        tokens.create("ci", [Grant.parse("*:read")])
    assert tokens.list() == made


def test_an_admin_of_all_makes_and_takes_tokens_over_the_wire(connect: ConnectAs) -> None:
    administration = RemoteTokens(connect("*:admin", subject="root"))
    made, text = administration.create("ci", [Grant.parse("team:push")], 3600)
    assert (made.created_by, connect(token=text).who_am_i().subject) == ("root", "ci")
    assert administration.revoke(made.id).revoked_by == "root"
    with pytest.raises(Unauthenticated):
        connect(token=text).who_am_i()
    with pytest.raises(TokenNotFound):
        administration.revoke("nothing")
    with pytest.raises(GrantInvalid):
        administration.create("two words", [Grant.parse("team:push")], None)


@pytest.mark.parametrize("text", ["", "team", "team:", "team:write", "Team:read", "../x:read", "a/b:read", ":read"])
def test_grants_that_are_none(text: str) -> None:
    with pytest.raises(GrantInvalid):
        Grant.parse(text)


def test_errors_carry_error_info(server: RegistryServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = registry_pb2_grpc.RegistryStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Resolve(registry_pb2.ResolveRequest(ref="x"))
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    sent = dict(caught.value.trailing_metadata())
    status = status_pb2.Status.FromString(sent["grpc-status-details-bin"])
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain, sent["loraplex-reason"]) == ("UNAUTHENTICATED", "loraplex", "UNAUTHENTICATED")
