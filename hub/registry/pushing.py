"""The calls that push: what is missing, the bytes, and the version made of them."""

# ruff: noqa: N802  # methods are called as the calls of the proto

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from hub.errors import HubError, RefInvalid, UploadLost
from hub.parsing import MAX_FILES, parse_directory
from hub.publishing import kept
from hub.refs import LATEST, AdapterRef, Alias, Digest
from hub.registry.access import Context, one_of
from hub.registry.laying_out import LayingOut, owner_of
from hub.registry.uploads import check_file
from hub.remote import messages
from protos.loraplex.v1 import registry_pb2 as pb

MAX_NAMED: Final = 100  # aliases or parents of one push
T = TypeVar("T")


class PushingCalls(LayingOut):
    """BeginPush, Upload, Publish."""

    def BeginPush(self, request: pb.BeginPushRequest, context: Context) -> pb.BeginPushResponse:
        """What is missing; bytes that this adapter's versions have already need not come again."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("push", ref.full_name)
        owner = owner_of(caller, ref)
        missing = []
        for name, digest, size in _files(request.files):
            stored = self._hub.holds_file(ref.full_name, digest) and not self._uploads.asked_anew(owner, digest)
            if not stored and not self._uploads.whole(owner, digest):
                offset = self._uploads.received(owner, digest, size)
                missing.append(pb.BeginPushResponse.Missing(name=name, offset=offset))
        return pb.BeginPushResponse(missing=missing)

    def Upload(self, parts: Iterator[pb.UploadRequest], context: Context) -> pb.UploadResponse:
        """Take one file in; cut short, what came is kept."""
        caller, parts = self._caller(context), self._patience.sent(parts, context)
        first = next(parts, None)
        if first is None or first.WhichOneof("part") != "begin":
            raise RefInvalid("an upload begins with what is uploaded")
        ref = AdapterRef.parse(first.begin.ref)
        caller.require("push", ref.full_name)
        [(name, digest, size)] = _files([first.begin.file])
        with one_of(self._transfers, "transfers"):
            have = self._uploads.receive(
                owner_of(caller, ref), name, digest, size, first.begin.offset, self._counted(parts)
            )
        return pb.UploadResponse(bytes=have)

    def Publish(self, request: pb.PublishRequest, context: Context) -> pb.PublishResponse:
        """Lay the files out, read them as any adapter is read, and make them a version."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("push", ref.full_name)
        if max(len(request.aliases), len(request.parents)) > MAX_NAMED:
            raise RefInvalid(f"a push names at most {MAX_NAMED} aliases and {MAX_NAMED} parents")
        aliases = [Alias.parse(alias).name for alias in request.aliases]
        asked = [*aliases, ref.selector.name] if isinstance(ref.selector, Alias) else aliases
        if any(alias != LATEST for alias in asked):
            caller.require("promote", ref.full_name)
        parents = []
        for text in request.parents:
            parent = AdapterRef.parse(text)
            caller.require("read", parent.full_name)
            parents.append(self._hub.resolve(parent).digest)
        owner, files = owner_of(caller, ref), _files(request.files)
        with (
            one_of(self._transfers, "transfers"),
            self._uploads.directory() as directory,
            ThreadPoolExecutor(1, thread_name_prefix="loraplex-flush") as beside,
        ):
            for name, digest, size in files:
                self._lay_out(owner, ref, name, digest, size, directory)
            # The disk and the processor have about as much to do.
            flushed = beside.submit(self._flush, [directory / name for name, _, _ in files])
            adapter = _without_paths(parse_directory, directory)
            for name, digest, _ in files:
                if adapter.files[name].sha256 != digest:  # damaged between its upload and now, by a crash perhaps
                    self._uploads.drop(owner, digest)
                    raise UploadLost(f"{name} was damaged on the server: it has to be uploaded again")
            flushed.result()
            result = self._acting(caller, context).publish(
                adapter, ref, located=messages.base_of(request.base) if request.HasField("base") else None,
                aliases=aliases, parents=parents, creator=request.creator if request.HasField("creator") else None,
                stored=kept,
            )  # fmt: skip
        for _, digest, _ in files:
            self._uploads.drop(owner, digest)
        return pb.PublishResponse(
            version=messages.version_message(result.version), created=result.created, warnings=result.warnings
        )

    def _flush(self, paths: Iterable[Path]) -> None:
        for path in paths:
            self._hub.storage.flush_file(path)

    def _counted(self, parts: Iterator[pb.UploadRequest]) -> Iterator[bytes]:
        for part in parts:
            if part.WhichOneof("part") != "data":
                raise RefInvalid("after its beginning an upload has data alone")
            data = part.data  # a copy each time
            self._observer.moved("in", len(data))
            yield data


def _files(sent: Iterable[pb.PushedFile]) -> list[tuple[str, Digest, int]]:
    files = []
    for file in sent:
        check_file(file.name, file.bytes)
        files.append((file.name, Digest.parse(file.sha256), file.bytes))
    if len({name for name, _, _ in files}) < len(files) or len(files) > MAX_FILES:
        raise RefInvalid("a file is named twice")
    return files


def _without_paths(read: Callable[..., T], directory: Any) -> T:
    """What `read` returns; where it refuses, without this machine's directory in the message."""
    try:
        return read(directory)
    except HubError as error:
        raise type(error)(str(error).replace(f"{directory}/", "").replace(str(directory), "the push")) from error
