"""How a signature is written: a Sigstore bundle 0.3 around a DSSE envelope, as OpenSSF model-signing's key mode does.

    {"mediaType": …, "verificationMaterial": {"publicKey": {"hint": <key id>}, "tlogEntries": []},
     "dsseEnvelope": {"payloadType": …, "payload": <base64>, "signatures": [{"sig": <base64>, "keyid": ""}]}}

Signed is DSSE's "PAE": the payload with its type and both lengths before it.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from hub import json_text
from hub.errors import SignatureInvalid
from hub.signing import statement
from hub.versions import Version

if TYPE_CHECKING:
    from hub.signing.keys import SigningKey

MEDIA_TYPE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
MAX_SIGNATURE_BYTES: Final = 64 * 1024
_KEY_ID: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class Envelope:
    """A signature, taken apart; who it is of is what it says, until a key has checked it."""

    key_id: str  # of the key that is said to have signed, see `hub.signing.keys.TrustedKey.id`
    payload: bytes
    signature: bytes

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The envelope in the bytes of a bundle; raises SignatureInvalid."""
        try:
            value = json_text.parse_object(data, max_bytes=MAX_SIGNATURE_BYTES)
            envelope = value["dsseEnvelope"]
            if value["mediaType"] != MEDIA_TYPE or envelope["payloadType"] != PAYLOAD_TYPE:
                raise ValueError("is of another kind")
            [signature] = envelope["signatures"]
            key_id = value["verificationMaterial"]["publicKey"]["hint"]
            if not _KEY_ID.fullmatch(key_id):
                raise ValueError("names no key")
            return cls(key_id, _bytes(envelope["payload"]), _bytes(signature["sig"]))
        except (ValueError, KeyError, TypeError) as error:
            why = str(error) if isinstance(error, ValueError) and not isinstance(error, binascii.Error) else "is broken"
            raise SignatureInvalid(f"a signature {why}: one is a Sigstore bundle as `hub sign` writes it") from error

    @property
    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        return pae(self.payload)


def sign(version: Version, key: SigningKey) -> bytes:
    """A signature of `version`."""
    payload = statement.statement_of(version)
    envelope: dict[str, Any] = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": key.public.id}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(key.sign(pae(payload))).decode(), "keyid": ""}],
        },
    }
    return json_text.canonical(envelope)


def check_signature(signature: bytes, version: Version) -> None:
    """Raise SignatureInvalid where these bytes are no signature of `version`, whoever made it."""
    statement.check(Envelope.parse(signature).payload, version)


def pae(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: type and content cannot run into each other."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def _bytes(text: Any) -> bytes:
    if not isinstance(text, str):
        raise TypeError
    return base64.b64decode(text, validate=True)
