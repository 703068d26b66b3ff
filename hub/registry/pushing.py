"""The calls that push: what is missing, the bytes, and the version made of them."""

# ruff: noqa: N802  # methods are called as the calls of the proto

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from hub.adapter_dir import FILE_LIMITS, parse_adapter
from hub.errors import HubError, RefInvalid, UploadLost
from hub.refs import LATEST, AdapterRef, Alias, Digest
from hub.registry.access import Access, Context, one_of
from hub.registry.grants import Caller
from hub.registry.uploads import check_file
from hub.remote import messages
from hub.verify import copy_checked
from protos.loraplex.v1 import registry_pb2 as pb

T = TypeVar("T")


class PushingCalls(Access):
    """BeginPush, Upload, Publish."""

    def BeginPush(self, request: pb.BeginPushRequest, context: Context) -> pb.BeginPushResponse:
        """What is missing; bytes that this adapter's versions have already need not come again."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("push", ref.full_name)
        owner = _owner(caller, ref)
        missing = []
        for name, digest, _ in _files(request.files):
            if not self._uploads.whole(owner, digest) and not self._hub.holds_file(ref.full_name, digest):
                offset = self._uploads.received(owner, digest)
                missing.append(pb.BeginPushResponse.Missing(name=name, offset=offset))
        return pb.BeginPushResponse(missing=missing)

    def Upload(self, parts: Iterator[pb.UploadRequest], context: Context) -> pb.UploadResponse:
        """Take one file in; cut short, what came is kept."""
        caller = self._caller(context)
        first = next(parts, None)
        if first is None or first.WhichOneof("part") != "begin":
            raise RefInvalid("an upload begins with what is uploaded")
        ref = AdapterRef.parse(first.begin.ref)
        caller.require("push", ref.full_name)
        [(name, digest, size)] = _files([first.begin.file])
        with one_of(self._transfers, "transfers"):
            have = self._uploads.receive(
                _owner(caller, ref), name, digest, size, first.begin.offset, self._counted(parts)
            )
        return pb.UploadResponse(bytes=have)

    def Publish(self, request: pb.PublishRequest, context: Context) -> pb.PublishResponse:
        """Lay the files out, read them as any adapter is read, and make them a version."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("push", ref.full_name)
        aliases = [Alias.parse(alias).name for alias in request.aliases]
        asked = [*aliases, ref.selector.name] if isinstance(ref.selector, Alias) else aliases
        if any(alias != LATEST for alias in asked):
            caller.require("promote", ref.full_name)
        parents = []
        for text in request.parents:
            parent = AdapterRef.parse(text)
            caller.require("read", parent.full_name)
            parents.append(self._hub.resolve(parent).digest)
        owner, files = _owner(caller, ref), _files(request.files)
        with one_of(self._transfers, "transfers"), self._uploads.directory() as directory:
            for name, digest, size in files:
                if not self._uploads.place(owner, digest, directory / name):
                    if not self._hub.holds_file(ref.full_name, digest):
                        raise UploadLost(f"{name} is not here any more: it has to be uploaded again")
                    with (directory / name).open("xb") as file:
                        copy_checked(self._hub.storage, digest, size, name, file.write)
            result = self._acting(caller, context).publish(
                _without_paths(parse_adapter, directory), ref,
                located=messages.base_of(request.base) if request.HasField("base") else None,
                aliases=aliases, parents=parents, creator=request.creator if request.HasField("creator") else None,
            )  # fmt: skip
        for _, digest, _ in files:
            self._uploads.drop(owner, digest)
        return pb.PublishResponse(
            version=messages.version_message(result.version), created=result.created, warnings=result.warnings
        )

    def _counted(self, parts: Iterator[pb.UploadRequest]) -> Iterator[bytes]:
        for part in parts:
            if part.WhichOneof("part") != "data":
                raise RefInvalid("after its beginning an upload has data alone")
            self._observer.moved("in", len(part.data))
            yield part.data


def _files(sent: Iterable[pb.PushedFile]) -> list[tuple[str, Digest, int]]:
    files = []
    for file in sent:
        check_file(file.name, file.bytes)
        files.append((file.name, Digest.parse(file.sha256), file.bytes))
    if len({name for name, _, _ in files}) < len(files) or len(files) > len(FILE_LIMITS):
        raise RefInvalid("a file is named twice")
    return files


def _owner(caller: Caller, ref: AdapterRef) -> str:
    return f"{caller.subject}\n{ref.full_name}"


def _without_paths(read: Callable[..., T], directory: Any) -> T:
    """What `read` returns; where it refuses, without this machine's directory in the message."""
    try:
        return read(directory)
    except HubError as error:
        raise type(error)(str(error).replace(f"{directory}/", "").replace(str(directory), "the push")) from error
