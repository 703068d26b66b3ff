"""Files to and from a shared hub, in parts: what was cut goes on where it ended, what arrives is hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from hub.adapter_dir import AdapterFile
from hub.errors import AdapterChanged, BlobCorrupt, BlobNotFound, HubUnavailable, UploadLost, UploadRefused
from hub.full_write import write_all
from hub.progress import Progress
from hub.remote.cache import Cache
from hub.remote.connection import CHUNK_BYTES, Connection, Stop
from hub.versions import Version
from hub.write_back import WriteBack
from protos.loraplex.v1 import registry_pb2 as pb

_ROUNDS: Final = 3


def upload(
    connection: Connection, directory: Path, files: Sequence[AdapterFile], ref: str, actor: str | None,
    progress: Progress | None, stop: Stop | None = None,
) -> None:  # fmt: skip
    """Bring the server what it lacks of `files`; raises AdapterChanged where one changed meanwhile, Stopped."""
    stop = stop or Stop()
    wanted = [pb.PushedFile(name=file.name, sha256=file.sha256, bytes=file.bytes) for file in files]
    by_name = {file.name: file for file in files}
    total = sum(file.bytes for file in files)
    offsets: dict[str, int] = {}
    acknowledged = 0  # what the server has; what was sent to it may be lost on the way, again and again

    def missing() -> dict[str, int]:
        nonlocal acknowledged
        stop.check()
        answer = connection.call("BeginPush", pb.BeginPushRequest(ref=ref, files=wanted), actor)
        found = {each.name: int(each.offset) for each in answer.missing}
        offsets.update({name: found.get(name, by_name[name].bytes) for name in by_name})
        acknowledged = sum(offsets.values())
        return found

    def told(name: str, done: int) -> None:
        offsets[name] = done
        if progress is not None:
            progress("uploading", sum(offsets.values()), total)

    def send_missing() -> None:
        for name, offset in missing().items():
            try:
                _send(connection, directory / name, by_name[name], ref, offset, actor, told, stop)
            except UploadRefused as error:
                if _sha256(directory / name) != by_name[name].sha256.hex:
                    raise AdapterChanged(f"{name} changed while it was being pushed; nothing was published") from error
                raise

    for last in range(_ROUNDS):
        try:
            connection.persist(send_missing, lambda: acknowledged)
            break
        except (UploadLost, UploadRefused):
            # Another push of the same bytes, or damage among those that came first: the server dropped them.
            if last + 1 == _ROUNDS:
                raise
    if progress is not None:
        progress("uploading", total, total)


def check_published(version: Version, full_name: str, files: Sequence[AdapterFile]) -> Version:
    """`version`, which the server says it made of `files`; raises BlobCorrupt where it holds something else."""
    held = {name: entry.sha256 for name, entry in version.manifest.files.items()}
    if version.full_name != full_name or held != {file.name: file.sha256 for file in files}:
        raise BlobCorrupt(f"the server answered {version.text}, which does not hold what was pushed")
    return version


def fetch(
    connection: Connection, cache: Cache, version: Version, filename: str, actor: str | None,
    told: Callable[[int], None] = lambda done: None,
) -> None:  # fmt: skip
    """Have one file of a version in the cache, verified; raises BlobCorrupt, and what the server answers."""
    entry = version.manifest.files[filename]
    if cache.blobs.has(entry.sha256):
        return
    damaged = BlobCorrupt(
        f"{filename} of {version.text} is damaged in the hub's storage: its bytes are not those that were pushed"
    )
    try:
        with cache.partial(entry.sha256) as partial:
            file = partial.file
            for attempt in ("go on", "anew"):
                resumed = file.seek(0, os.SEEK_END)
                if resumed > entry.bytes or attempt == "anew":
                    file.truncate(0)
                    resumed = 0
                file.seek(0)
                hasher = hashlib.file_digest(file, "sha256")  # of what is here; the rest is hashed as it comes

                def receive(hasher: hashlib._Hash = hasher) -> None:
                    have = file.seek(0, os.SEEK_END)
                    request = pb.ReadFileRequest(digest=version.digest, filename=filename, offset=have)
                    disk = WriteBack(file.fileno(), have)
                    for part in connection.stream("ReadFile", request, actor) if have < entry.bytes else ():
                        data = part.data  # a copy each time
                        have += len(data)
                        if have > entry.bytes:
                            raise damaged
                        write_all(file, data)
                        disk.wrote(have)
                        hasher.update(data)
                        told(have)

                connection.persist(receive, lambda: file.seek(0, os.SEEK_END))
                if hasher.hexdigest() == entry.sha256.hex:
                    break
                file.truncate(0)
                if not resumed:
                    raise damaged
            else:
                raise damaged
            cache.keep(partial, entry.sha256)
    except BlobNotFound as error:
        raise BlobCorrupt(f"{filename} of {version.text} is missing from the hub's storage") from error
    except OSError as error:
        raise HubUnavailable(f"the cache of the hub cannot be written: {os.strerror(error.errno or 0)}") from error


def _send(
    connection: Connection, path: Path, file: AdapterFile, ref: str, offset: int, actor: str | None,
    told: Callable[[str, int], None], stop: Stop,
) -> None:  # fmt: skip
    pushed = pb.PushedFile(name=file.name, sha256=file.sha256, bytes=file.bytes)
    short = False
    unreadable: list[OSError] = []

    def parts() -> Iterator[pb.UploadRequest]:
        # What is raised in here would reach gRPC alone, which tells it as a broken connection.
        try:
            yield from read()
        except OSError as error:
            unreadable.append(error)

    def read() -> Iterator[pb.UploadRequest]:
        nonlocal short
        yield pb.UploadRequest(begin=pb.UploadRequest.Begin(ref=ref, file=pushed, offset=offset))
        done = offset
        with path.open("rb") as source:
            source.seek(offset)
            while done < file.bytes:
                data = source.read(min(CHUNK_BYTES, file.bytes - done))
                if not data:
                    short = True
                    return
                yield pb.UploadRequest(data=data)
                done += len(data)
                told(file.name, done)

    answer = connection.call_that_ends("Upload", parts(), actor, stop)
    if unreadable:
        raise AdapterChanged(f"{file.name} cannot be read any more: {unreadable[0].strerror}") from unreadable[0]
    if short or answer.bytes < file.bytes:
        raise AdapterChanged(f"{file.name} changed while it was being pushed; nothing was published")


def _sha256(path: Path) -> str | None:
    """The file's digest; None where it is gone."""
    try:
        with path.open("rb") as source:
            return hashlib.file_digest(source, "sha256").hexdigest()
    except OSError:
        return None
