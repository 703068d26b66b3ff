"""Signatures and imports on a shared hub: who may, what is sent, and what goes on while it is away."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hub.bundle import Bundle
from hub.errors import AdapterNotFound, Forbidden, HubUnavailable, SignatureMissing, VersionClash
from hub.exporting import export_bundle
from hub.hub import Hub
from hub.refs import AdapterRef
from hub.registry.server import RegistryConfig, RegistryServer
from hub.remote.remote_hub import RemoteHub
from hub.signing import keys
from hub.signing.policy import TrustPolicy
from hub.signing.pushing import push_signed, sign_version
from hub.signing.requiring import requiring
from hub.versions import Version
from protos.loraplex.v1 import registry_pb2 as pb
from server.adapters.directory import AdapterDirectory, hub_fetch
from tests.hub.making import lora_tensors, write_adapter
from tests.hub.registry.conftest import ConnectAs


def adapter(tmp_path: Path, seed: int) -> Path:
    return write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))


def test_roles(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    ada = keys.generate(tmp_path / "ada")
    version = store.push(adapter(tmp_path, 1), "team/x").version
    with pytest.raises(Forbidden):
        sign_version(connect("team:read"), version, ada)
    with pytest.raises(AdapterNotFound):
        connect("other:read").signatures(version.digest)
    assert sign_version(connect("team:promote"), version, ada)
    assert connect("team:read").signatures(version.digest) == store.signatures(version.digest)
    assert [event.actor for event in store.events(0) if event.kind == "sign"] == ["ada"]
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        laptop.push(adapter(tmp_path, 2), "team/y")
        laptop.push(adapter(tmp_path, 3), "other/z")
        laptop.tag("team/y", "prod")
        export_bundle(laptop, ["team/y"], tmp_path / "y")
        export_bundle(laptop, ["team/y", "other/z"], tmp_path / "both")
    with Bundle(tmp_path / "both") as bundle, pytest.raises(Forbidden, match="other"):
        connect("team:push").adopt(bundle.arrivals, bundle.lay_out)
    with Bundle(tmp_path / "y") as bundle:
        with pytest.raises(Forbidden):
            connect("team:read").adopt(bundle.arrivals, bundle.lay_out)
        with pytest.raises(Forbidden, match="promote"):
            connect("team:push").adopt(bundle.arrivals, bundle.lay_out, aliases=bundle.aliases)
        assert store.last_seq() == 3
        hub = connect("team:push,promote")
        [adopted] = hub.adopt(bundle.arrivals, bundle.lay_out, aliases=bundle.aliases)
        assert (adopted.version.text, adopted.outcome) == ("team/y@1", "imported")
        assert [each.outcome for each in hub.adopt(bundle.arrivals, bundle.lay_out)] == ["known"]
    assert list((tmp_path / "uploads").glob("*/*")) == []
    assert store.verify() == []


def test_a_clash_is_told_over_the_wire(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    store.push(adapter(tmp_path, 1), "x")
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        laptop.push(adapter(tmp_path, 2), "x")
        export_bundle(laptop, ["x"], tmp_path / "b")
    with Bundle(tmp_path / "b") as bundle:
        with pytest.raises(VersionClash, match="--renumber"):
            connect("*:push").adopt(bundle.arrivals, bundle.lay_out)
        [adopted] = connect("*:push").adopt(bundle.arrivals, bundle.lay_out, renumber=True)
        assert (adopted.number, adopted.version.text) == (1, "x@2")


def test_an_import_brings_back_a_file_that_a_shared_hub_lost(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    version = store.push(adapter(tmp_path, 1), "x").version
    export_bundle(store, ["x"], tmp_path / "b")
    stored_weights(tmp_path, version).unlink()
    with Bundle(tmp_path / "b") as bundle:
        assert [each.outcome for each in connect("*:push").adopt(bundle.arrivals, bundle.lay_out)] == ["known"]
    assert store.verify() == []


def test_an_import_mends_a_damaged_file_that_its_version_shares(connect: ConnectAs, store: Hub, tmp_path: Path) -> None:
    version = store.push(adapter(tmp_path, 1), "x").version
    with Hub.open(str(tmp_path / "laptop")) as laptop:
        other = write_adapter(tmp_path / "other", config={"lora_alpha": 16}, tensors=lora_tensors(seed=1))
        laptop.push(other, "x")
        export_bundle(laptop, ["x"], tmp_path / "b")
    weights = stored_weights(tmp_path, version)
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1])
    with Bundle(tmp_path / "b") as bundle:
        [adopted] = connect("*:push").adopt(bundle.arrivals, bundle.lay_out, renumber=True)
    assert adopted.version.text == "x@2"
    assert store.verify() == []


def stored_weights(tmp_path: Path, version: Version) -> Path:
    hex_digits = version.manifest.files["adapter_model.safetensors"].sha256.hex
    return tmp_path / "hub" / "blobs" / "sha256" / hex_digits[:2] / hex_digits


def test_hostile_calls(connect: ConnectAs, store: Hub) -> None:
    hub = connect("*:push")
    begin = pb.AdoptRequest(begin=pb.AdoptRequest.Begin())
    rubbish = pb.AdoptRequest(arrival=pb.AdoptRequest.Arrival(number=1, manifest=b"{}"))
    for parts in ([], [rubbish], [begin, begin], [begin, rubbish], [begin, pb.AdoptRequest()]):
        with pytest.raises(Exception) as refused:
            hub.connection.call("Adopt", iter(parts))
        assert refused.value.reason in ("REF_INVALID", "BUNDLE_REFUSED")  # type: ignore[attr-defined]
    with pytest.raises(Exception) as refused:
        hub.connection.call("Sign", pb.SignRequest(digest="sha256:../..", signature=b"x"))
    assert refused.value.reason == "REF_INVALID"  # type: ignore[attr-defined]
    assert store.last_seq() == 0


def test_signing_over_the_wire_and_while_it_is_away(store: Hub, tmp_path: Path) -> None:
    ada = keys.generate(tmp_path / "ada")
    server = RegistryServer(store, None, RegistryConfig(listen="127.0.0.1:0", uploads=tmp_path / "uploads")).start()
    with RemoteHub.open(f"grpc://{server.address}") as hub:
        version = push_signed(hub, adapter(tmp_path, 1), AdapterRef.parse("x:prod"), ada)[0].version
        assert TrustPolicy((ada.public,)).check(version, store.signatures(version.digest))
        guarded = requiring(hub, [tmp_path / "ada.pub"])
        guarded.pull("x:prod", tmp_path / "first")
        other = hub.push(adapter(tmp_path, 2), "y").version
        server.stop(0)
        anew = requiring(hub, [tmp_path / "ada.pub"])
        anew.pull("x:prod", tmp_path / "second")
        with pytest.raises(HubUnavailable):
            anew.read_file(other, "adapter_config.json")


def test_the_inference_server_serves_what_is_signed_and_nothing_else(store: Hub, tmp_path: Path) -> None:
    """As `hub serve --require-signature` puts it together: an alias that moves to an unsigned version is refused."""
    ada = keys.generate(tmp_path / "ada")
    push_signed(store, adapter(tmp_path, 1), AdapterRef.parse("x:prod"), ada)
    guarded = requiring(store, [tmp_path / "ada.pub"])
    directory = AdapterDirectory(guarded, poll_seconds=0.02)
    try:
        ref = AdapterRef.parse("x:prod")
        first = directory.resolve(ref)
        assert hub_fetch(guarded)(first.digest).weights
        second = store.push(adapter(tmp_path, 2), "x:prod").version
        for _ in range(500):
            if directory.cached(ref) is None:
                break

            time.sleep(0.01)
        with pytest.raises(SignatureMissing):
            directory.resolve(ref)
        with pytest.raises(SignatureMissing):
            hub_fetch(guarded)(second.digest)
        assert directory.resolve(AdapterRef.parse("x@1")).digest == first.digest
        sign_version(store, second, ada)
        assert directory.resolve(ref).digest == second.digest
    finally:
        directory.close()
