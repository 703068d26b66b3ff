"""Signatures: kept beside versions, over every engine and behind a server; broken ones are refused by reason."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hub.errors import (
    AdapterChanged,
    AdapterNotFound,
    HubError,
    KeyUnusable,
    SignatureInvalid,
    SignatureMissing,
    SignatureUntrusted,
)
from hub.facade import HubFacade
from hub.hub import Hub
from hub.rebuild import rebuild
from hub.refs import AdapterRef
from hub.signing import envelope, keys, statement
from hub.signing.policy import TrustPolicy
from hub.signing.pushing import push_signed, sign_version
from hub.signing.requiring import requiring
from hub.versions import Version
from tests.hub.making import lora_tensors, write_adapter


def adapter(tmp_path: Path, seed: int) -> Path:
    return write_adapter(tmp_path / f"adapter-{seed}", tensors=lora_tensors(seed=seed))


def new_key(path: Path) -> keys.SigningKey:
    return keys.generate(path)


def trust(*signers: keys.SigningKey) -> TrustPolicy:
    return TrustPolicy(tuple(signer.public for signer in signers))


def test_a_signature_is_kept_found_and_checked(hub: HubFacade, tmp_path: Path) -> None:
    ada, bob = new_key(tmp_path / "ada.key"), new_key(tmp_path / "bob.key")
    result, added = push_signed(hub, adapter(tmp_path, 1), AdapterRef.parse("team/x:prod"), ada, aliases=["canary"])
    version = result.version
    assert (result.created, added) == (True, True)
    assert {"latest", "prod", "canary"} <= hub.aliases("team/x").keys()
    assert [key.id for key in trust(ada, bob).check(version, hub.signatures(version.digest))] == [ada.public.id]
    with pytest.raises(SignatureUntrusted, match=ada.public.id[:16]):
        trust(bob).check(version, hub.signatures(version.digest))
    assert sign_version(hub, version, bob)
    assert not sign_version(hub, version, bob), "once is enough"
    assert len(hub.signatures(version.digest)) == 2
    assert len(trust(ada, bob).check(version, hub.signatures(version.digest))) == 2
    again, added = push_signed(hub, adapter(tmp_path, 1), AdapterRef.parse("team/x"), ada)
    assert (again.created, added, again.version.digest) == (False, False, version.digest)
    assert [event.kind for event in hub.events(0) if event.kind == "sign"] == ["sign", "sign"]
    assert hub.verify() == []
    assert hub.fsck() == []


def test_the_digest_does_not_depend_on_signatures(hub: HubFacade, tmp_path: Path) -> None:
    version = hub.push(adapter(tmp_path, 1), "x").version
    sign_version(hub, version, new_key(tmp_path / "k"))
    assert hub.resolve("x") == version
    hub.pull("x", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == version.manifest.files.keys()


def test_what_is_not_signed_is_not_given_out(hub: HubFacade, tmp_path: Path) -> None:
    ada = new_key(tmp_path / "ada.key")
    guarded = requiring(hub, [tmp_path / "ada.key.pub"])
    plain = hub.push(adapter(tmp_path, 1), "x").version
    doors: list[Callable[[], object]] = [
        lambda: guarded.resolve("x"),
        lambda: guarded.get(plain.digest),
        lambda: guarded.pull("x", tmp_path / "out"),
        lambda: guarded.read_file(plain, "adapter_config.json"),
        lambda: guarded.read_file(plain.digest, "adapter_config.json"),
        lambda: guarded.acting_as("eve").resolve("x"),
    ]
    for door in doors:
        with pytest.raises(SignatureMissing) as refused:
            door()
        assert refused.value.reason == "SIGNATURE_MISSING"
    assert not (tmp_path / "out").exists()
    sign_version(hub, plain, new_key(tmp_path / "eve.key"))
    with pytest.raises(SignatureUntrusted) as untrusted:
        guarded.resolve("x")
    assert untrusted.value.reason == "SIGNATURE_UNTRUSTED"
    sign_version(hub, plain, ada)
    for door in doors:
        door()
    assert guarded.versions() == hub.versions(), "what is not read is the hub's own"
    assert requiring(hub, []) is hub


def reworked(signature: bytes, change: Callable[[dict], object]) -> bytes:  # type: ignore[type-arg]
    value = json.loads(signature)
    change(value)
    return json.dumps(value).encode()


def with_payload(signature: bytes, change: Callable[[dict], object]) -> bytes:  # type: ignore[type-arg]
    def rewrite(value: dict) -> None:  # type: ignore[type-arg]
        payload = json.loads(base64.b64decode(value["dsseEnvelope"]["payload"]))
        change(payload)
        value["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()

    return reworked(signature, rewrite)


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "no JSON": lambda data: b"x",
    "cut": lambda data: data[:-1],
    "too large": lambda data: data[:-1] + b" " * 70_000 + b"}",
    "another media type": lambda data: reworked(data, lambda v: v.update(mediaType="text/plain")),
    "another payload type": lambda data: reworked(data, lambda v: v["dsseEnvelope"].update(payloadType="x")),
    "no signature in it": lambda data: reworked(data, lambda v: v["dsseEnvelope"].update(signatures=[])),
    "two signatures in it": lambda data: reworked(data, lambda v: v["dsseEnvelope"]["signatures"].append({"sig": ""})),
    "no key named": lambda data: reworked(data, lambda v: v.update(verificationMaterial={})),
    "a key that is none": lambda data: reworked(data, lambda v: v["verificationMaterial"]["publicKey"].update(hint=3)),
    "no base64": lambda data: reworked(data, lambda v: v["dsseEnvelope"].update(payload="%%%")),
    "another predicate": lambda data: with_payload(data, lambda p: p.update(predicateType="x")),
    "another statement": lambda data: with_payload(data, lambda p: p.update(_type="x")),
    "of another version": lambda data: with_payload(
        data, lambda p: p["predicate"]["loraplex"].update(version="sha256:" + "0" * 64)
    ),
    "another file": lambda data: with_payload(data, lambda p: p["predicate"]["resources"][0].update(digest="0" * 64)),
    "a file less": lambda data: with_payload(data, lambda p: p["predicate"]["resources"].pop()),
    "another root": lambda data: with_payload(data, lambda p: p["subject"][0]["digest"].update(sha256="0" * 64)),
    "two subjects": lambda data: with_payload(data, lambda p: p["subject"].append(p["subject"][0])),
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_no_signature_of_the_version_is_not_kept(how: str, tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        version = hub.push(adapter(tmp_path, 1), "x").version
        good = envelope.sign(version, new_key(tmp_path / "k"))
        with pytest.raises(SignatureInvalid) as refused:
            hub.add_signature(version.digest, BROKEN[how](good))
        assert refused.value.reason == "SIGNATURE_INVALID"
        assert hub.signatures(version.digest) == ()
        assert hub.last_seq() == 2, "a refused signature is no event"


def test_a_signature_of_one_version_does_nothing_for_another(tmp_path: Path) -> None:
    ada = new_key(tmp_path / "k")
    with Hub.open(str(tmp_path / "hub")) as hub:
        first, second = (hub.push(adapter(tmp_path, seed), "x").version for seed in (1, 2))
        with pytest.raises(SignatureInvalid, match="another version"):
            hub.add_signature(second.digest, envelope.sign(first, ada))
        with pytest.raises(SignatureInvalid, match="another version"):
            trust(ada).check(second, [envelope.sign(first, ada)])
        with pytest.raises(AdapterNotFound):
            hub.add_signature("sha256:" + "0" * 64, envelope.sign(first, ada))


def test_every_bit_of_what_is_signed_counts(tmp_path: Path) -> None:
    """A flipped bit anywhere in payload, signature or key id makes the signature worthless, never an error of ours."""
    ada = new_key(tmp_path / "k")
    with Hub.open(str(tmp_path / "hub")) as hub:
        version = hub.push(adapter(tmp_path, 1), "x").version
    data = envelope.sign(version, ada)
    parsed = envelope.Envelope.parse(data)
    assert ada.public.signed(parsed.signed_bytes, parsed.signature)
    for position in range(0, len(parsed.payload), 7):
        flipped = bytearray(parsed.payload)
        flipped[position] ^= 1 << position % 8
        assert not ada.public.signed(envelope.pae(bytes(flipped)), parsed.signature)
    for position in range(len(parsed.signature)):
        flipped = bytearray(parsed.signature)
        flipped[position] ^= 1 << position % 8
        assert not ada.public.signed(parsed.signed_bytes, bytes(flipped))
    for position in range(0, len(data), 11):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        try:
            trust(ada).check(version, [bytes(flipped)])
        except (SignatureInvalid, SignatureUntrusted):
            continue
        # The change must then be one that says the same, as between two ways to write a base64 ending.
        assert envelope.Envelope.parse(bytes(flipped)) == parsed or envelope.Envelope.parse(bytes(flipped)).payload == (
            parsed.payload
        )


def test_a_key_that_did_not_sign_cannot_be_named(tmp_path: Path) -> None:
    ada, eve = new_key(tmp_path / "ada"), new_key(tmp_path / "eve")
    with Hub.open(str(tmp_path / "hub")) as hub:
        version = hub.push(adapter(tmp_path, 1), "x").version
        forged = reworked(
            envelope.sign(version, eve), lambda v: v["verificationMaterial"]["publicKey"].update(hint=ada.public.id)
        )
        hub.add_signature(version.digest, forged)  # a hub trusts nobody, so it cannot tell
        with pytest.raises(SignatureInvalid, match="does not fit the key"):
            trust(ada).check(version, hub.signatures(version.digest))
        sign_version(hub, version, ada)
        assert trust(ada).check(version, hub.signatures(version.digest)), "a forgery beside a good one does no harm"
        states = sorted(finding.state for finding in trust(ada).examine(version, hub.signatures(version.digest)))
        assert states == ["invalid", "trusted"]


def test_a_manifest_that_was_tampered_with_is_not_what_was_signed(tmp_path: Path) -> None:
    ada = new_key(tmp_path / "k")
    with Hub.open(str(tmp_path / "hub")) as hub:
        version = hub.push(adapter(tmp_path, 1), "x").version
    manifest = replace(version.manifest, metrics={"f1": 1.0})
    forged = Version(version.full_name, version.number, manifest.digest, manifest, version.created)
    with pytest.raises(SignatureInvalid):
        trust(ada).check(forged, [envelope.sign(version, ada)])


def test_a_server_cannot_have_something_else_signed(tmp_path: Path) -> None:
    """What a hub says it stored is compared with the directory before the key is used."""
    ada = new_key(tmp_path / "k")
    with Hub.open(str(tmp_path / "hub")) as hub:
        other = hub.push(adapter(tmp_path, 2), "x")
        lying = requiring(hub, [])
        monkey = pytest.MonkeyPatch()
        monkey.setattr(Hub, "push", lambda *a, **k: other)
        with pytest.raises(AdapterChanged, match="not signed"):
            push_signed(lying, adapter(tmp_path, 1), AdapterRef.parse("x:prod"), ada)
        monkey.undo()
        assert hub.signatures(other.version.digest) == ()
        assert "prod" not in hub.aliases("x")


def test_signatures_survive_a_rebuild_and_a_sweep_and_go_with_their_version(tmp_path: Path) -> None:
    ada, url = new_key(tmp_path / "k"), str(tmp_path / "hub")
    with Hub.open(url) as hub:
        versions = [hub.push(adapter(tmp_path, seed), "x").version for seed in (1, 2)]
        for version in versions:
            sign_version(hub, version, ada)
        assert hub.sweep(retention_seconds=0, grace_seconds=0).blobs == 0, "a signature is not in the way"
    (tmp_path / "hub" / "catalog.sqlite").unlink()
    rebuild(url)
    with Hub.open(url) as hub:
        for version in versions:
            assert trust(ada).check(version, hub.signatures(version.digest))
        assert hub.fsck() == []
        hub.remove("x@1")
        hub.restore("x@1")
        assert trust(ada).check(versions[0], hub.signatures(versions[0].digest))
        hub.remove("x@1")
        swept = hub.sweep(retention_seconds=0, grace_seconds=0)
        assert swept.purged == ("x@1",)
        assert swept.blobs == 3, "manifest, weights and signature; the config is the other version's too"
        assert hub.fsck() == []
    (tmp_path / "hub" / "catalog.sqlite").unlink()
    rebuild(url)
    with Hub.open(url) as hub:
        assert hub.fsck() == []


def test_damage_to_a_kept_signature_is_told(tmp_path: Path) -> None:
    ada, url = new_key(tmp_path / "k"), str(tmp_path / "hub")
    with Hub.open(url) as hub:
        version = hub.push(adapter(tmp_path, 1), "x").version
        sign_version(hub, version, ada)
        [data] = hub.signatures(version.digest)
        digits = hashlib.sha256(data).hexdigest()
        path = tmp_path / "hub" / "blobs" / "sha256" / digits[:2] / digits
        path.chmod(0o644)
        path.write_bytes(data[:-1] + b" ")
        assert [(p.version, p.reason) for p in hub.verify()] == [("x@1", "BLOB_CORRUPT")]
        assert [(p.version, p.reason) for p in hub.verify("x")] == [("x@1", "BLOB_CORRUPT")]
        with pytest.raises(HubError) as refused:
            hub.signatures(version.digest)
        assert refused.value.reason == "BLOB_CORRUPT"
        path.unlink()
        assert [(p.version, p.reason) for p in hub.fsck()] == [("x@1", "BLOB_CORRUPT")]
        hub.add_signature(version.digest, data)  # adding it again mends it
        assert hub.verify() == []
        assert hub.fsck() == []


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.key"
    made = keys.generate(path, "open sesame")
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(KeyUnusable, match="never overwritten"):
        keys.generate(path)
    with pytest.raises(KeyUnusable, match="is encrypted"):
        keys.read_signing_key(path)
    monkeypatch.setenv("LORAPLEX_SIGNING_PASSPHRASE", "wrong")
    with pytest.raises(KeyUnusable, match="passphrase is wrong"):
        keys.read_signing_key(path)
    monkeypatch.setenv("LORAPLEX_SIGNING_PASSPHRASE", "open sesame")
    assert keys.read_signing_key(path).public.id == made.public.id
    public = tmp_path / "deep" / "a.key.pub"
    assert keys.read_trusted_keys([public, public])[0].id == made.public.id
    with pytest.raises(KeyUnusable, match="a private key"):
        keys.read_trusted_keys([path])
    with pytest.raises(KeyUnusable, match="there is no key"):
        keys.read_signing_key(tmp_path / "nothing")
    (tmp_path / "rubbish").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    with pytest.raises(KeyUnusable, match="cannot be read"):
        keys.read_trusted_keys([tmp_path / "rubbish"])
    (tmp_path / "large").write_bytes(b"x" * 100_000)
    with pytest.raises(KeyUnusable, match="too large"):
        keys.read_trusted_keys([tmp_path / "large"])
    both = tmp_path / "both.pub"
    other = keys.generate(tmp_path / "b.key")
    both.write_text(public.read_text() + (tmp_path / "b.key.pub").read_text())
    assert {key.id for key in keys.read_trusted_keys([both])} == {made.public.id, other.public.id}


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1", "SECP256K1", "ed25519", "rsa"])
def test_which_keys_are_taken(curve: str, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if curve == "ed25519":
        private: object = ed25519.Ed25519PrivateKey.generate()
    elif curve == "rsa":
        private = rsa.generate_private_key(65537, 2048)
    else:
        private = ec.generate_private_key(getattr(ec, curve)())
    path = tmp_path / "k"
    path.write_bytes(
        private.private_bytes(  # type: ignore[attr-defined]
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    (tmp_path / "k.pub").write_bytes(
        private.public_key().public_bytes(  # type: ignore[attr-defined]
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    if curve.startswith("SECP") and curve.endswith("R1"):
        key = keys.read_signing_key(path)
        [public] = keys.read_trusted_keys([tmp_path / "k.pub"])
        assert public.id == key.public.id
        assert public.signed(b"data", key.sign(b"data"))
        assert not public.signed(b"Data", key.sign(b"data"))
        return
    for read in (lambda: keys.read_signing_key(path), lambda: keys.read_trusted_keys([tmp_path / "k.pub"])):
        with pytest.raises(KeyUnusable):
            read()


def test_a_version_has_so_many_signatures_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub.catalog_signatures.MAX_SIGNATURES", 3)
    ada = new_key(tmp_path / "k")
    with Hub.open(str(tmp_path / "hub")) as hub:
        version = hub.push(adapter(tmp_path, 1), "x").version
        for _ in range(3):
            assert hub.add_signature(version.digest, envelope.sign(version, ada))
        with pytest.raises(SignatureInvalid, match="3 signatures"):
            hub.add_signature(version.digest, envelope.sign(version, ada))


def test_the_statement_is_what_the_format_says(tmp_path: Path) -> None:
    with Hub.open(str(tmp_path / "hub")) as hub:
        version = hub.push(adapter(tmp_path, 1), "team/x").version
    value = json.loads(statement.statement_of(version))
    files = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "adapter-1").iterdir()}
    assert value["subject"] == [
        {"name": "team/x", "digest": {"sha256": hashlib.sha256(b"".join(files[n] for n in sorted(files))).hexdigest()}}
    ]
    assert {each["name"]: each["digest"] for each in value["predicate"]["resources"]} == {
        name: digest.hex() for name, digest in files.items()
    }
    assert value["predicate"]["loraplex"] == {"version": version.digest}
