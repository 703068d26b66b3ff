"""Versions of another hub on their way to a shared one: files first, then all of them in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hub import adopting
from hub.adapter_dir import AdapterFile
from hub.arrivals import Adopted, AliasArrival, Arrival, LayOut
from hub.errors import AdapterNotFound, BlobCorrupt, UploadLost
from hub.progress import Progress
from hub.remote import messages
from hub.remote.connection import Connection
from hub.remote.transfer import upload
from protos.loraplex.v1 import registry_pb2 as pb

_ROUNDS = 5
_OUTCOMES: dict[str, Any] = {"imported": "imported", "known": "known", "restored": "restored"}


class RemoteAdopting:
    """The part of `hub.remote.remote_hub.RemoteHub` that takes versions of another hub to the server."""

    _connection: Connection
    _actor: str | None

    def adopt(
        self,
        arrivals: Sequence[Arrival],
        lay_out: LayOut,
        *,
        aliases: Sequence[AliasArrival] = (),
        renumber: bool = False,
        progress: Progress | None = None,
    ) -> list[Adopted]:
        """See `Hub.adopt`; read by the server as any push is. Files that it has under the same name are not sent."""
        adopting.check(arrivals, aliases)
        for attempt in range(_ROUNDS):
            for arrival in arrivals:
                # That the server lost a file of a version which it knows comes to light when it takes the version in.
                if attempt or not self._knows(arrival):
                    self._send(arrival, lay_out, progress)
            try:
                # Said again after a cut it changes nothing: the versions are known then.
                answer = self._connection.persist(
                    lambda: self._connection.call(
                        "Adopt", _requests(arrivals, aliases, renumber=renumber), self._actor, seconds=None
                    ),
                    lambda: 0,
                )
                break
            except UploadLost:
                if attempt + 1 == _ROUNDS:
                    raise
        found = [
            Adopted(messages.version_of(each.version), each.number, _OUTCOMES[each.outcome], each.signatures_added)
            for each in answer.adopted
        ]
        if [each.version.digest for each in found] != [arrival.digest for arrival in arrivals]:
            raise BlobCorrupt("the server answered with other versions than it was sent")
        return found

    def _knows(self, arrival: Arrival) -> bool:
        try:
            self._connection.call("GetVersion", pb.GetVersionRequest(digest=arrival.digest), self._actor)
        except AdapterNotFound:
            return False
        return True

    def _send(self, arrival: Arrival, lay_out: LayOut, progress: Progress | None) -> None:
        files = [AdapterFile(name, entry.bytes, entry.sha256) for name, entry in arrival.manifest.files.items()]
        with lay_out(arrival) as directory:
            upload(self._connection, directory, files, arrival.manifest.name, self._actor, progress)


def _requests(
    arrivals: Sequence[Arrival], aliases: Sequence[AliasArrival], *, renumber: bool
) -> Iterator[pb.AdoptRequest]:
    moved = [
        pb.AdoptRequest.Alias(
            full_name=each.full_name, alias=each.alias,
            targets=[pb.AliasState.Target(version=number, weight=weight) for number, weight in each.held],
        )
        for each in aliases
    ]  # fmt: skip
    yield pb.AdoptRequest(begin=pb.AdoptRequest.Begin(renumber=renumber, aliases=moved))
    for arrival in arrivals:
        yield pb.AdoptRequest(
            arrival=pb.AdoptRequest.Arrival(
                number=arrival.number, manifest=arrival.manifest.canonical(), signatures=arrival.signatures
            )
        )
