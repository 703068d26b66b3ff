"""Base models as the hub knows them: where one lies on this machine, and which one it is.

A base is named by a built-in name (entry point group "hub.bases"), a local directory, or a Hugging Face id
"org/name[@revision]". Which one it *is* says its fingerprint, see `hub.fingerprint`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from hub.base_identity import BaseIdentity
from hub.errors import BaseMalformed, BaseNotFound
from hub.fingerprint import BaseFingerprint, fingerprint_directory
from hub.progress import Progress

__all__ = ["BaseFingerprint", "BaseIdentity", "LocatedBase", "base_identity", "fingerprint_directory", "locate_base"]

_HUGGING_FACE_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,128}))?", re.ASCII)
# What a causal language model needs; tokenizers come in several files.
_WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class LocatedBase:
    """A base model on this machine."""

    name: str  # how others can name it: built-in name, Hugging Face id, or the directory's last component
    revision: str | None  # a commit of the Hugging Face repository
    directory: Path  # holds config.json and *.safetensors


def locate_base(text: str) -> LocatedBase:
    """Where the base that `text` names lies, downloading it where need be.

    Raises BaseNotFound, whose message says the one thing to do, or BaseMalformed where the directory is no model.
    """
    for entry in entry_points(group="hub.bases", name=text):
        return _checked(LocatedBase(text, None, _built_in(entry)))
    directory = Path(text).expanduser()
    if directory.is_dir():
        directory = directory.resolve()
        return _checked(LocatedBase(directory.name, None, directory))
    match = _HUGGING_FACE_ID.fullmatch(text)
    if match is None or text.startswith((".", "/", "~")):
        names = ", ".join(sorted(entry.name for entry in entry_points(group="hub.bases"))) or "none"
        raise BaseNotFound(
            f"there is no base {text!r}: give a built-in name ({names}), an existing directory, or a Hugging Face id "
            "org/name[@revision]"
        )
    return _checked(_downloaded(match[1], match[2]))


def base_identity(text: str, *, progress: Progress | None = None) -> tuple[BaseIdentity, BaseFingerprint]:
    """The identity of the base that `text` names, weights read and hashed; raises what `locate_base` raises."""
    located = locate_base(text)
    fingerprint = fingerprint_directory(located.directory, progress=progress)
    return BaseIdentity(located.name, located.revision, fingerprint.fingerprint), fingerprint


def _built_in(entry: EntryPoint) -> Path:
    try:
        directory_of = entry.load()
    except (ImportError, AttributeError) as error:
        raise BaseNotFound(f"the built-in base {entry.name!r} cannot be loaded here: {error}") from error
    return Path(directory_of())


def _downloaded(name: str, revision: str | None) -> LocatedBase:
    # Imported here: it takes a third of a second, and only this kind of base needs it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED_FILES))
    except LocalEntryNotFoundError as error:
        raise BaseNotFound(
            f"{name} is not in this machine's Hugging Face cache and cannot be downloaded now: run "
            f"`hf download {name}` with a network, or give a local directory"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        shown = f"{name}@{revision}" if revision else name
        raise BaseNotFound(
            f"Hugging Face has no model {shown}, or it needs a token (run `hf auth login`): {type(error).__name__}"
        ) from error
    except OSError as error:
        raise BaseNotFound(f"{name} could not be downloaded: {error.strerror or type(error).__name__}") from error
    # Snapshots are kept under the commit's hash.
    return LocatedBase(name, directory.name if re.fullmatch(r"[0-9a-f]{40}", directory.name) else revision, directory)


def _checked(base: LocatedBase) -> LocatedBase:
    if not (base.directory / "config.json").is_file():
        raise BaseMalformed(f"the base {base.name!r} has no config.json")
    return base
