"""Signs versions: right after a push, or later."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hub.errors import AdapterChanged
from hub.facade import HubFacade
from hub.progress import Progress
from hub.publishing import pushed_aliases
from hub.refs import LATEST, AdapterRef, Alias
from hub.signing import envelope
from hub.signing.keys import SigningKey
from hub.signing.policy import TrustPolicy
from hub.versions import PushResult, Version


def push_signed(
    hub: HubFacade,
    directory: Path,
    ref: AdapterRef,
    key: SigningKey,
    *,
    base: str | None = None,
    aliases: Sequence[str] = (),
    parents: Sequence[AdapterRef | str] = (),
    creator: str | None = None,
    progress: Progress | None = None,
) -> tuple[PushResult, bool]:
    """Push, sign, then move the aliases: they never hold the version unsigned (":latest" does, for a moment).

    What the push did, and whether the signature is new. Before signing, the version is compared with the directory:
    nobody signs what a server made of it. Raises what `Hub.push` and `Hub.tag` raise.
    """
    wanted = dict.fromkeys([*(Alias.parse(alias).name for alias in aliases), *pushed_aliases(ref)])
    plain = replace(ref, selector=Alias(LATEST))
    result = hub.push(directory, plain, base=base, parents=parents, creator=creator, progress=progress)
    _check_is(directory, result.version)
    added = sign_version(hub, result.version, key)
    for alias in wanted:
        hub.tag(exact(result.version), alias)
    return result, added


def sign_version(hub: HubFacade, version: Version, key: SigningKey) -> bool:
    """Sign a version; False where this key's signature is there already."""
    found = TrustPolicy((key.public,)).examine(version, hub.signatures(version.digest))
    if any(finding.state == "trusted" for finding in found):
        return False
    return hub.add_signature(version.digest, envelope.sign(version, key))


def exact(version: Version) -> AdapterRef:
    """A reference to this version and no other."""
    return replace(AdapterRef.parse(version.full_name), selector=version.digest)


def _check_is(directory: Path, version: Version) -> None:
    found = {path.name: _sha256(path) for path in directory.iterdir()}
    if found != {name: entry.sha256.hex for name, entry in version.manifest.files.items()}:
        raise AdapterChanged(f"{version.text} does not hold the files in {directory}; it was not signed")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
