"""What is signed: an in-toto statement that names the version's digest and, for other tools, every file's.

Its predicate is that of OpenSSF model-signing 1.0, which lists a directory's files and lets a predicate carry more:
`model_signing verify key` takes a pulled directory for what was signed. What counts here is the `version` in it, the
digest of the manifest, which stands for all bytes and facts.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

from hub import json_text
from hub.errors import SignatureInvalid
from hub.versions import Version

STATEMENT: Final = "https://in-toto.io/Statement/v1"
PREDICATE: Final = "https://model_signing/signature/v1.0"
MAX_STATEMENT_BYTES: Final = 48 * 1024


def statement_of(version: Version) -> bytes:
    """The statement about a version: canonical JSON."""
    return json_text.canonical(
        {
            "_type": STATEMENT,
            "subject": [{"name": version.full_name, "digest": {"sha256": _root(version)}}],
            "predicateType": PREDICATE,
            "predicate": {
                "serialization": {
                    "method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [],
                },
                "resources": _resources(version),
                "loraplex": {"version": version.digest},
            },
        }
    )  # fmt: skip


def check(statement: bytes, version: Version) -> None:
    """Raise SignatureInvalid where this is no statement, or one about another version."""
    try:
        value = json_text.parse_object(statement, max_bytes=MAX_STATEMENT_BYTES)
        told = (
            value["_type"],
            value["predicateType"],
            value["predicate"]["serialization"]["method"],
            value["predicate"]["serialization"]["hash_type"],
        )
        [subject] = value["subject"]
        named = value["predicate"]["loraplex"]["version"]
        files = value["predicate"]["resources"]
        root = subject["digest"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise SignatureInvalid("a signature's statement is not one about a version") from error
    if told != (STATEMENT, PREDICATE, "files", "sha256"):
        raise SignatureInvalid("a signature's statement is of a kind this release does not read")
    if named != version.digest:
        raise SignatureInvalid(f"a signature is of another version than {version.text}")
    if files != _resources(version) or root != _root(version):
        raise SignatureInvalid(f"a signature lists other files than {version.text} has")


def _resources(version: Version) -> list[dict[str, Any]]:
    files = version.manifest.files
    return [{"name": name, "algorithm": "sha256", "digest": files[name].sha256.hex} for name in sorted(files)]


def _root(version: Version) -> str:
    """SHA-256 over the files' digests, in the order of their names."""
    hasher = hashlib.sha256()
    for resource in _resources(version):
        hasher.update(bytes.fromhex(resource["digest"]))
    return hasher.hexdigest()
