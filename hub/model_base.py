"""A base that is a whole model in the hub: `--base team/support@3`, beside built-in names and directories.

The version is pulled once into this user's cache, under its digest, and hashed again every time it is used.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

import platformdirs

from hub.errors import AdapterNotFound, BaseNotFound, HubNotFound, HubUnavailable, RefInvalid
from hub.facade import HubFacade
from hub.opening import open_existing
from hub.refs import AdapterRef
from hub.signing.requiring import requiring
from hub.versions import Version

_CHUNK: Final = 8 * 1024 * 1024


def find_base(text: str, hub_url: str | None = None, trusted_keys: Sequence[Path] = ()) -> str:
    """`text` as `hub.base.locate_base` takes it: a model of the hub becomes the directory it was pulled into.

    Built-in names and directories come first; a name that the hub does not have is left for Hugging Face, unless it has
    an alias, which no name there has. Raises BaseNotFound where the hub has an adapter of this name, AliasNotFound,
    VersionNotFound, BlobCorrupt, HubUnavailable; with `trusted_keys` what `hub.signing.requiring` raises.
    """
    if entry_points(group="hub.bases", name=text) or Path(text).expanduser().is_dir():
        return text
    try:
        ref = AdapterRef.parse(text)
    except RefInvalid:
        return text
    explicit = ":" in text
    try:
        with requiring(open_existing(hub_url), trusted_keys) as hub:
            version = hub.resolve(ref)
            if version.manifest.kind != "model":
                raise BaseNotFound(
                    f"{version.text} is an adapter, no model: serve its base and name the adapter in requests"
                )
            return str(pulled(hub, version))
    except (AdapterNotFound, HubNotFound):
        if explicit:
            raise
        return text


def pulled(hub: HubFacade, version: Version) -> Path:
    """The directory in this user's cache that holds the model `version`, every byte checked just now.

    Raises BlobCorrupt, HubUnavailable and what `HubFacade.pull` raises.
    """
    parent = platformdirs.user_cache_path("loraplex") / "models" / version.digest.hex
    directory = parent / f"{version.full_name.replace('/', '--')}@{version.number}"
    if _intact(directory, version):
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    exact = AdapterRef(*_parts(version.full_name), version.digest)
    aside = parent / f".{uuid.uuid4().hex}"
    try:
        hub.pull(exact, aside)
        with suppress(OSError):  # somebody else was quicker; theirs is checked below
            aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    if not _intact(directory, version):
        raise HubUnavailable(f"{version.text} could not be kept in {parent}")
    return directory


def _intact(directory: Path, version: Version) -> bool:
    files = version.manifest.files
    try:
        if {path.name for path in directory.iterdir()} != files.keys():
            return False
        for name, entry in files.items():
            hasher = hashlib.sha256()
            with (directory / name).open("rb") as file:
                while chunk := file.read(_CHUNK):
                    hasher.update(chunk)
            if hasher.hexdigest() != entry.sha256.hex:
                return False
    except OSError:
        return False
    return True


def _parts(full_name: str) -> tuple[str | None, str]:
    namespace, slash, name = full_name.rpartition("/")
    return (namespace if slash else None), name
