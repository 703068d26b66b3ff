"""The servicer's call that takes in versions of another hub."""

# ruff: noqa: N802  # methods are called as the calls of the proto

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from hub.arrivals import AliasArrival, Arrival
from hub.errors import BlobCorrupt, BundleRefused, RefInvalid
from hub.manifest import Manifest
from hub.refs import AdapterRef
from hub.registry.access import Context, one_of
from hub.registry.grants import Caller
from hub.registry.laying_out import LayingOut, owner_of
from hub.registry.uploads import check_file
from hub.remote import messages
from protos.loraplex.v1 import registry_pb2 as pb

MAX_VERSIONS: Final = 1000  # of one call
MAX_BYTES: Final = 64 * 1024 * 1024  # of their manifests and signatures


class AdoptCall(LayingOut):
    """Adopt."""

    def Adopt(self, parts: Iterator[pb.AdoptRequest], context: Context) -> pb.AdoptResponse:
        """See `Hub.adopt`; for who may push versions of every adapter that comes, and promote where aliases move."""
        caller = self._caller(context)
        begin, arrivals = _read(self._patience.sent(parts, context))
        for arrival in arrivals:
            caller.require("push", AdapterRef.parse(arrival.manifest.name).full_name)
        aliases = [_alias(each) for each in begin.aliases]
        for alias in aliases:
            caller.require("promote", AdapterRef.parse(alias.full_name).full_name)
        with one_of(self._transfers, "transfers"):
            adopted = self._acting(caller, context).adopt(
                arrivals, lambda arrival: self._laid_out(caller, arrival), aliases=aliases, renumber=begin.renumber
            )
        for arrival in arrivals:
            owner = owner_of(caller, AdapterRef.parse(arrival.manifest.name))
            for entry in arrival.manifest.files.values():
                self._uploads.drop(owner, entry.sha256)
        return pb.AdoptResponse(
            adopted=[
                pb.AdoptResponse.Adopted(
                    version=messages.version_message(each.version), number=each.number, outcome=each.outcome,
                    signatures_added=each.signatures_added,
                )
                for each in adopted
            ]
        )  # fmt: skip

    @contextmanager
    def _laid_out(self, caller: Caller, arrival: Arrival) -> Iterator[Path]:
        ref = AdapterRef.parse(arrival.manifest.name)
        with self._uploads.directory() as directory:
            for name, entry in arrival.manifest.files.items():
                check_file(name, entry.bytes)
                self._lay_out(owner_of(caller, ref), ref, name, entry.sha256, entry.bytes, directory)
            yield directory


def _read(parts: Iterator[pb.AdoptRequest]) -> tuple[pb.AdoptRequest.Begin, list[Arrival]]:
    first = next(parts, None)
    if first is None or first.WhichOneof("part") != "begin":
        raise RefInvalid("an import begins with how it is to be done")
    arrivals: list[Arrival] = []
    held = 0
    for part in parts:
        if part.WhichOneof("part") != "arrival":
            raise RefInvalid("after its beginning an import has versions alone")
        told = part.arrival
        held += len(told.manifest) + sum(map(len, told.signatures))
        if len(arrivals) == MAX_VERSIONS or held > MAX_BYTES:
            raise BundleRefused(f"at most {MAX_VERSIONS} versions are imported into a shared hub at once")
        try:
            manifest = Manifest.parse(told.manifest)
        except BlobCorrupt as error:
            raise BundleRefused(f"what was sent as a manifest is none: {error}") from error
        arrivals.append(Arrival(told.number, manifest, tuple(told.signatures)))
    return first.begin, arrivals


def _alias(told: pb.AdoptRequest.Alias) -> AliasArrival:
    return AliasArrival(told.full_name, told.alias, tuple((each.version, each.weight) for each in told.targets))
