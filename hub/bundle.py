"""Versions in one file, for places without a network: written once, read with nothing taken on trust.

A bundle is a plain tar file that any tar lists and extracts:

    loraplex-bundle.json             the index: versions, aliases, and every blob with its digest and size, in order
    blobs/sha256/<64 hex digits>     manifests, files and signatures, each once

A reader knows from the index what every byte of the rest must be: each member's name, type and size, its digest, and
the length of the whole file. So nothing is left to be extracted by name, linked, or blown up; see docs/FORMAT.md.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

from hub import json_text
from hub.arrivals import MAX_ARRIVALS, AliasArrival, Arrival
from hub.errors import BlobCorrupt, BundleRefused, HubUnavailable, RefInvalid, TargetNotEmpty
from hub.manifest import MAX_MANIFEST_BYTES, Manifest
from hub.parsing import MAX_FILE_BYTES
from hub.progress import Progress
from hub.refs import Digest
from hub.signing.envelope import MAX_SIGNATURE_BYTES
from hub.staging import beside

SCHEMA: Final = "loraplex.bundle/1"
INDEX: Final = "loraplex-bundle.json"
MAX_INDEX_BYTES: Final = 64 * 1024 * 1024
_BLOCK: Final = tarfile.BLOCKSIZE
_END: Final = bytes(2 * _BLOCK)
_CHUNK: Final = 1024 * 1024
_CHECKSUM: Final = slice(148, 156)  # of a header: six octal digits, NUL, space


@dataclass(frozen=True)
class Packed:
    """One version to write: its bytes on this machine."""

    arrival: Arrival
    directory: Path  # holds its files


class BundleWriter:
    """Writes a bundle: what goes in is known first, then the bytes come, version by version."""

    def __init__(self, arrivals: Sequence[Arrival], aliases: Sequence[AliasArrival]) -> None:
        self._small: dict[Digest, bytes] = {}
        self._sizes: dict[Digest, int] = {}  # in the order in which they are written
        for arrival in arrivals:
            for data in (arrival.manifest.canonical(), *arrival.signatures):
                self._small[_digest(data)] = data
                self._sizes.setdefault(_digest(data), len(data))
            for entry in arrival.manifest.files.values():
                self._sizes.setdefault(entry.sha256, entry.bytes)
        self._index = _signed_off(
            {
                "schema": SCHEMA,
                "versions": [
                    {
                        "name": arrival.manifest.name, "number": arrival.number, "digest": arrival.digest,
                        "signatures": [_digest(signature) for signature in arrival.signatures],
                    }
                    for arrival in arrivals
                ],
                "aliases": [{"name": each.full_name, "alias": each.alias, "targets": each.held} for each in aliases],
                "blobs": [{"sha256": digest, "bytes": size} for digest, size in self._sizes.items()],
            }
        )  # fmt: skip

    @property
    def length(self) -> int:
        """How many bytes the file will have."""
        return _length(len(self._index), self._sizes.values())

    def write(self, target: Path, packed: Iterator[Packed], progress: Progress | None = None) -> None:
        """Write the file, whole or not at all; `packed` are the arrivals, in order, one directory at a time.

        Raises TargetNotEmpty where the file is there, HubUnavailable where it cannot be written, BlobCorrupt.
        """
        target = target.absolute()
        try:
            if target.exists() or target.is_symlink():
                raise TargetNotEmpty(f"{target} is there already; give another name")
            self._write_whole(beside(target), target, packed, progress)
        except OSError as error:
            raise HubUnavailable(f"{target} cannot be written: {os.strerror(error.errno or 0)}") from error

    def _write_whole(self, temporary: Path, target: Path, packed: Iterator[Packed], progress: Progress | None) -> None:
        try:
            with temporary.open("xb") as out:
                self._write(out, packed, progress)
                out.flush()
                os.fsync(out.fileno())
            try:
                os.link(temporary, target)
            except FileExistsError as error:
                raise TargetNotEmpty(f"{target} was made by somebody else meanwhile") from error
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                    raise
                temporary.rename(target)  # a file system without hard links, as sticks have
        finally:
            temporary.unlink(missing_ok=True)

    def _write(self, out: BinaryIO, packed: Iterator[Packed], progress: Progress | None) -> None:
        out.write(_header(INDEX, len(self._index)))
        _padded(out, self._index)
        written: set[Digest] = set()
        for each in packed:
            own = {entry.sha256: each.directory / name for name, entry in each.arrival.manifest.files.items()}
            for digest in (each.arrival.digest, *map(_digest, each.arrival.signatures), *own):
                if digest in written:
                    continue
                written.add(digest)
                out.write(_header(_member(digest), self._sizes[digest]))
                if digest in self._small:
                    _padded(out, self._small[digest])
                else:
                    _copy(own[digest], out, digest, self._sizes[digest])
                if progress is not None:
                    progress("exporting", out.tell(), self.length)
        out.write(_END)


class Bundle:
    """A bundle on this machine, opened and checked whole; closed by `with`.

    Raises BundleRefused where anything in it is not as it should be, HubUnavailable where it cannot be read.
    """

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        self._path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise HubUnavailable(f"{path} cannot be read: {error.strerror}") from error
        try:
            self._offsets: dict[Digest, tuple[int, int]] = {}  # where a blob begins, its size
            self.arrivals, self.aliases = self._checked(progress)
        except OSError as error:
            self._file.close()
            raise HubUnavailable(f"{path} cannot be read: {error.strerror}") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @contextmanager
    def lay_out(self, arrival: Arrival) -> Iterator[Path]:
        """A directory with the files of a version, hashed once more, gone afterwards."""
        try:
            with tempfile.TemporaryDirectory(prefix="loraplex-import-") as made:
                for name, entry in arrival.manifest.files.items():
                    hasher = hashlib.sha256()
                    with (Path(made) / name).open("xb") as out:
                        for chunk in self._chunks(entry.sha256):
                            hasher.update(chunk)
                            out.write(chunk)
                    if hasher.hexdigest() != entry.sha256.hex:
                        raise BundleRefused("the bundle changed while it was being read")
                yield Path(made)
        except OSError as error:
            raise HubUnavailable(f"the bundle cannot be unpacked: {os.strerror(error.errno or 0)}") from error

    def _checked(self, progress: Progress | None) -> tuple[tuple[Arrival, ...], tuple[AliasArrival, ...]]:
        index = _parsed(self._member(INDEX, None, MAX_INDEX_BYTES))
        sizes = _sizes(index)
        total = os.fstat(self._file.fileno()).st_size
        wanted = _length(self._file.tell() - _BLOCK, sizes.values(), padded=True)
        if total < wanted:
            raise BundleRefused(f"the bundle is cut short: it has {total} bytes of {wanted}")
        for digest, size in sizes.items():
            self._take(digest, size)
            if progress is not None:
                progress("checking", self._file.tell(), wanted)
        while chunk := self._file.read(_CHUNK):
            if chunk.strip(b"\0"):
                raise BundleRefused("the bundle has more in it than its index lists")
        return self._arrivals(index, sizes)

    def _member(self, name: str, size: int | None, limit: int) -> bytes:
        """A small member's bytes."""
        found = self._next(name, size)
        if found > limit:
            raise BundleRefused(f"{name} in the bundle is too large")
        data = self._file.read(found)
        self._skip_padding(found)
        if len(data) != found:
            raise BundleRefused("the bundle is cut short")
        return data

    def _take(self, digest: Digest, size: int) -> None:
        self._next(_member(digest), size)
        self._offsets[digest] = (self._file.tell(), size)
        hasher, left = hashlib.sha256(), size
        while left:
            chunk = self._file.read(min(left, _CHUNK))
            if not chunk:
                raise BundleRefused("the bundle is cut short")
            hasher.update(chunk)
            left -= len(chunk)
        self._skip_padding(size)
        if hasher.hexdigest() != digest.hex:
            raise BundleRefused(f"the bundle is damaged: {_member(digest)} does not have the digest in its name")

    def _next(self, name: str, size: int | None) -> int:
        """Read the next header, which must be of a plain file with this name, and (if given) size; its size."""
        block = self._file.read(_BLOCK)
        try:
            found = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
            raise BundleRefused(
                f"this is no bundle, or a damaged one: where {name} should be is no tar header"
            ) from error
        # tarfile reads the checksum's own eight bytes leniently, and they are the only ones that no checksum covers.
        if block[_CHECKSUM] != b"%06o\0 " % found.chksum:
            raise BundleRefused(f"the bundle is damaged: the header of {name} has no proper checksum")
        if found.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or found.linkname or found.name != name:
            raise BundleRefused(f"the bundle holds {ascii(found.name)[:80]} where its index calls for the file {name}")
        if found.size < 0 or (size is not None and found.size != size):
            raise BundleRefused(f"{name} in the bundle has {found.size} bytes, its index says {size}")
        if block != _header(name, found.size):
            raise BundleRefused(f"the header of {name} in the bundle is not as a bundle has it")
        return int(found.size)

    def _skip_padding(self, size: int) -> None:
        if self._file.read(-size % _BLOCK).strip(b"\0"):
            raise BundleRefused("the bundle has bytes where a tar file has none")

    def _arrivals(
        self, index: Mapping[str, Any], sizes: Mapping[Digest, int]
    ) -> tuple[tuple[Arrival, ...], tuple[AliasArrival, ...]]:
        arrivals, needed = [], set()
        try:
            for told in index["versions"]:
                digest = Digest.parse(told["digest"])
                signatures = [Digest.parse(each) for each in told["signatures"]]
                needed |= {digest, *signatures}
                manifest = Manifest.parse(self._small(digest, MAX_MANIFEST_BYTES))
                for name, entry in manifest.files.items():
                    if sizes.get(entry.sha256) != entry.bytes:
                        raise BundleRefused(f"{told['name']}: {name} is not in the bundle")
                    needed.add(entry.sha256)
                if manifest.name != told["name"]:
                    raise BundleRefused(f"the index tells another name than the manifest {digest}")
                if type(told["number"]) is not int:
                    raise TypeError
                read = tuple(self._small(each, MAX_SIGNATURE_BYTES) for each in signatures)
                arrivals.append(Arrival(told["number"], manifest, read))
            aliases = tuple(
                AliasArrival(each["name"], each["alias"], tuple((int(n), int(w)) for n, w in each["targets"]))
                for each in index["aliases"]
            )
            for each in aliases:
                if not (isinstance(each.full_name, str) and isinstance(each.alias, str)):
                    raise TypeError
        except BlobCorrupt as error:
            raise BundleRefused("a manifest in the bundle is none that this release reads") from error
        except (KeyError, TypeError, ValueError, RefInvalid) as error:
            raise BundleRefused("the bundle's index is not as docs/FORMAT.md says") from error
        if needed != sizes.keys():
            raise BundleRefused("the bundle holds bytes that none of its versions has")
        for arrival in arrivals:
            arrival.check()
        return tuple(arrivals), aliases

    def _small(self, digest: Digest, limit: int) -> bytes:
        if digest not in self._offsets or self._offsets[digest][1] > limit:
            raise BundleRefused(f"{digest} is not in the bundle, or too large for what it is")
        return b"".join(self._chunks(digest))

    def _chunks(self, digest: Digest) -> Iterator[bytes]:
        begin, left = self._offsets[digest]
        self._file.seek(begin)
        while left:
            chunk = self._file.read(min(left, _CHUNK))
            if not chunk:
                raise BundleRefused("the bundle changed while it was being read")
            left -= len(chunk)
            yield chunk


def _signed_off(index: dict[str, Any]) -> bytes:
    """The index with its own digest: names of aliases and numbers are in nothing else that has one."""
    return json_text.canonical({**index, "sha256": json_text.digest_of(index)})


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        index = json_text.parse_object(data, max_bytes=MAX_INDEX_BYTES)
        told = index.pop("sha256", None)
        if index.keys() != {"schema", "versions", "aliases", "blobs"} or index["schema"] != SCHEMA:
            raise ValueError("is of a kind this release does not read")
        if not 1 <= len(index["versions"]) <= MAX_ARRIVALS:
            raise ValueError(f"lists {len(index['versions'])} versions; 1 to {MAX_ARRIVALS} are taken")
        if told != json_text.digest_of(index) or data != _signed_off(index):
            raise ValueError("is damaged: it does not have the digest in it")
    except (ValueError, TypeError) as error:
        raise BundleRefused(f"the bundle's index {error}") from error
    return index


def _sizes(index: Mapping[str, Any]) -> dict[Digest, int]:
    """Every blob with its size, in the order in which they come."""
    sizes: dict[Digest, int] = {}
    try:
        for told in index["blobs"]:
            digest, size = Digest.parse(told["sha256"]), told["bytes"]
            if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MAX_FILE_BYTES:
                raise ValueError
            if digest in sizes:
                raise BundleRefused(f"the bundle's index lists {digest} twice")
            sizes[digest] = size
    except (KeyError, TypeError, ValueError, RefInvalid) as error:
        raise BundleRefused("the bundle's index is not as docs/FORMAT.md says") from error
    return sizes


def _length(index: int, sizes: Iterable[int], *, padded: bool = False) -> int:
    """The length of a bundle whose index and blobs have these sizes."""
    whole: int = index if padded else index + -index % _BLOCK
    return _BLOCK + whole + sum(_BLOCK + size + -size % _BLOCK for size in sizes) + len(_END)


def _member(digest: Digest) -> str:
    return f"blobs/sha256/{digest.hex}"


def _digest(data: bytes) -> Digest:
    return Digest.of_hex(hashlib.sha256(data).hexdigest())


def _header(name: str, size: int) -> bytes:
    """A tar header in which nothing depends on who writes it, or when."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o444
    return info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def _padded(out: BinaryIO, data: bytes) -> None:
    out.write(data)
    out.write(bytes(-len(data) % _BLOCK))


def _copy(source: Path, out: BinaryIO, digest: Digest, size: int) -> None:
    hasher, left = hashlib.sha256(), size
    with source.open("rb") as file:
        while left and (chunk := file.read(min(left, _CHUNK))):
            hasher.update(chunk)
            out.write(chunk)
            left -= len(chunk)
    if left or hasher.hexdigest() != digest.hex:
        raise BlobCorrupt(f"{source.name} changed while it was being exported")
    out.write(bytes(-size % _BLOCK))
