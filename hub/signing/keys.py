"""Keys that sign, and keys that are trusted: PEM files over a NIST curve, as OpenSSL writes them.

Loads `cryptography`, so it is imported only where something is signed or a signature is checked.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import platformdirs
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hub.errors import KeyUnusable

KEY_ENVIRONMENT: Final = "LORAPLEX_SIGNING_KEY"
PASSPHRASE_ENVIRONMENT: Final = "LORAPLEX_SIGNING_PASSPHRASE"
MAX_KEY_BYTES: Final = 64 * 1024
# What model-signing's key mode takes, each with the hash it is used with.
_HASHES: Final[Mapping[str, hashes.HashAlgorithm]] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}
_PUBLIC_BLOCK: Final = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True)
class TrustedKey:
    """A public key, whose signatures count."""

    id: str  # SHA-256 over its PEM text, 64 hex digits: what signatures name it by
    name: str  # the file it came from, for people
    _public: ec.EllipticCurvePublicKey

    @classmethod
    def of(cls, public: ec.EllipticCurvePublicKey, name: str) -> Self:
        """This key; raises KeyUnusable for another curve."""
        if public.curve.name not in _HASHES:
            raise KeyUnusable(f"{name}: the curve {public.curve.name} is not taken; P-256, P-384 and P-521 are")
        return cls(hashlib.sha256(_pem(public)).hexdigest(), name, public)

    @property
    def pem(self) -> str:
        """The key as a PEM file holds it."""
        return _pem(self._public).decode()

    def signed(self, data: bytes, signature: bytes) -> bool:
        """Whether this key's owner signed `data`."""
        try:
            self._public.verify(signature, data, ec.ECDSA(_HASHES[self._public.curve.name]))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class SigningKey:
    """A private key."""

    public: TrustedKey
    _private: ec.EllipticCurvePrivateKey

    def sign(self, data: bytes) -> bytes:
        """An ECDSA signature over `data`, DER."""
        return self._private.sign(data, ec.ECDSA(_HASHES[self._private.curve.name]))


def default_key_file() -> Path:
    """The private key that is used where none is named: LORAPLEX_SIGNING_KEY, else this user's."""
    named = os.environ.get(KEY_ENVIRONMENT)
    return Path(named) if named else platformdirs.user_config_path("loraplex") / "signing.key"


def read_signing_key(path: Path) -> SigningKey:
    """The private key in a PEM file, with the passphrase in LORAPLEX_SIGNING_PASSPHRASE; raises KeyUnusable."""
    data = _read(path)
    passphrase = os.environ.get(PASSPHRASE_ENVIRONMENT)
    try:
        private = serialization.load_pem_private_key(data, passphrase.encode() if passphrase else None)
    except TypeError as error:
        what = f"is encrypted: set {PASSPHRASE_ENVIRONMENT}" if not passphrase else "is not encrypted; unset the phrase"
        raise KeyUnusable(f"{path} {what}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        hint = " (or the passphrase is wrong)" if passphrase else ""
        raise KeyUnusable(f"{path} holds no private key in PEM{hint}; `hub key generate` makes one") from error
    if not isinstance(private, ec.EllipticCurvePrivateKey):
        raise KeyUnusable(f"{path} holds a key of another kind; P-256, P-384 and P-521 are taken")
    return SigningKey(TrustedKey.of(private.public_key(), path.name), private)


def read_trusted_keys(paths: Sequence[Path]) -> tuple[TrustedKey, ...]:
    """The public keys in these PEM files, one or several a file; raises KeyUnusable."""
    found: dict[str, TrustedKey] = {}
    for path in paths:
        data = _read(path)
        blocks = _PUBLIC_BLOCK.findall(data)
        if not blocks:
            private = b"PRIVATE KEY" in data
            advice = "a private key; trust is in the public one (`hub key show`)" if private else "no public key in PEM"
            raise KeyUnusable(f"{path} holds {advice}")
        for block in blocks:
            try:
                public = serialization.load_pem_public_key(block)
            except (ValueError, UnsupportedAlgorithm) as error:
                raise KeyUnusable(f"{path} holds a public key that cannot be read") from error
            if not isinstance(public, ec.EllipticCurvePublicKey):
                raise KeyUnusable(f"{path} holds a key of another kind; P-256, P-384 and P-521 are taken")
            key = TrustedKey.of(public, path.name)
            found.setdefault(key.id, key)
    return tuple(found.values())


def generate(path: Path, passphrase: str | None = None) -> SigningKey:
    """A new P-256 key in `path`, readable by the user alone, its public half in `path`.pub; raises KeyUnusable."""
    private = ec.generate_private_key(ec.SECP256R1())
    made = SigningKey(TrustedKey.of(private.public_key(), path.name), private)
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    text = private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    public_path = path.with_name(path.name + ".pub")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as halves:  # half a pair is no key: both files, or none
            for file, data, mode in ((path, text, 0o600), (public_path, made.public.pem.encode(), 0o644)):
                descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
                halves.callback(file.unlink, missing_ok=True)
                with os.fdopen(descriptor, "wb") as out:
                    out.write(data)
            halves.pop_all()
    except FileExistsError as error:
        raise KeyUnusable(f"{error.filename} is there already; a key is never overwritten") from error
    except OSError as error:
        raise KeyUnusable(f"{path} cannot be written: {error.strerror}") from error
    return made


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_KEY_BYTES + 1)
    except FileNotFoundError as error:
        raise KeyUnusable(f"there is no key at {path}; `hub key generate` makes one") from error
    except OSError as error:
        raise KeyUnusable(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_KEY_BYTES:
        raise KeyUnusable(f"{path} is too large for a key")
    return data


def _pem(public: ec.EllipticCurvePublicKey) -> bytes:
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
