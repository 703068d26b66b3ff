"""From a Hugging Face repository into a directory that can be pushed: an adapter's files, at one commit, no others."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from hub.adapter_dir import CONFIG_FILE, FILE_LIMITS, WEIGHTS_FILE
from hub.errors import AdapterFileMissing, AdapterTooLarge, PickleRefused, SourceError
from hub.facts import FACTS_FILE, Facts
from hub.hugging_face.address import SCHEME, Address
from hub.hugging_face.client import client, reasons
from hub.progress import Progress

_COMMIT: Final = re.compile(r"[0-9a-f]{40}", re.ASCII)
_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True)
class Fetched:
    """What came."""

    commit: str  # 40 hex digits: what the revision was
    left_out: tuple[str, ...]  # files of the repository that are no part of an adapter


def fetch(address: Address, directory: Path, progress: Progress | None = None) -> Fetched:
    """Put the adapter at `address` into the empty `directory`, with its origin in loraplex.json.

    The revision is looked up once; every file is then of that commit. Taken are the four files an adapter may have,
    whatever else is there - code, pickles, tokenizers - is not even downloaded. Raises a SourceError,
    AdapterFileMissing, PickleRefused, AdapterTooLarge, FactsMalformed.
    """
    api = client()
    with reasons(address):
        info = api.model_info(address.repository, revision=address.revision, files_metadata=True)
    commit, there = str(info.sha), {each.rfilename: each for each in info.siblings or ()}
    if not _COMMIT.fullmatch(commit):
        raise SourceError(f"Hugging Face names no commit for {address}")
    wanted = _wanted(address, there)
    total = sum(there[name].size or 0 for name in wanted)
    done = 0
    for name in wanted:

        def told(more: int) -> None:
            nonlocal done
            done += more
            if progress is not None:
                progress("downloading", min(done, total), total)

        with reasons(address):
            path = api.hf_hub_download(address.repository, name, revision=commit, tqdm_class=_bar(told))
        _copy(Path(str(path)), directory / name, there[name], address)
    _note_origin(directory, address, commit)
    return Fetched(commit, tuple(sorted(there.keys() - set(wanted))))


def _wanted(address: Address, there: dict[str, Any]) -> list[str]:
    """The adapter's files among those of the repository."""
    if CONFIG_FILE not in there:
        raise AdapterFileMissing(f"{address} has no {CONFIG_FILE}: is it an adapter that PEFT saved?")
    if WEIGHTS_FILE not in there:
        pickles = [name for name in there if name.endswith((".bin", ".pt", ".pth"))]
        if pickles:
            raise PickleRefused(
                f"{address} has its weights as a pickle ({pickles[0][:80]!a}), which runs code when loaded, and no "
                f"{WEIGHTS_FILE}; ask its author for safetensors"
            )
        raise AdapterFileMissing(f"{address} has no {WEIGHTS_FILE}: is it an adapter that PEFT saved?")
    wanted = [name for name in FILE_LIMITS if name in there]
    for name in wanted:
        if (there[name].size or 0) > FILE_LIMITS[name]:
            limit = FILE_LIMITS[name]
            raise AdapterTooLarge(f"{name} of {address} has {there[name].size} bytes; at most {limit} are taken")
    return wanted


def _copy(source: Path, target: Path, told: Any, address: Address) -> None:
    """Copy out of Hugging Face's cache, where files are links; compare with the digest that the repository lists."""
    hasher, size = hashlib.sha256(), 0
    blob = hashlib.sha1(b"blob %d\0" % (told.size or 0), usedforsecurity=False)  # Git's name for a file it keeps itself
    try:
        with source.open("rb") as file, target.open("xb") as out:
            while chunk := file.read(_CHUNK):
                size += len(chunk)
                if size > FILE_LIMITS[target.name]:
                    raise AdapterTooLarge(f"{target.name} of {address} is larger than Hugging Face said")
                hasher.update(chunk)
                blob.update(chunk)
                out.write(chunk)
    except OSError as error:
        raise SourceError(f"{target.name} of {address} cannot be written: {error.strerror}") from error
    listed, found = (told.lfs.sha256, hasher) if told.lfs is not None else (told.blob_id, blob)
    if listed is not None and listed != found.hexdigest():
        raise SourceError(f"{target.name} of {address} is damaged: it is not the file that the repository lists")


def _note_origin(directory: Path, address: Address, commit: str) -> None:
    path = directory / FACTS_FILE
    facts = Facts.parse(path.read_bytes()) if path.exists() else Facts()
    origin = {"url": f"{SCHEME}{address.repository}", "commit": commit}
    replace(facts, recipe={**facts.recipe, "imported_from": origin}).write(directory)


def _bar(told: Callable[[int], None]) -> Any:
    """A progress bar for the client that draws nothing and tells how many bytes came."""
    from tqdm.auto import tqdm

    class Told(tqdm):  # type: ignore[misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            told(int(n or 0))
            return None

    return Told
