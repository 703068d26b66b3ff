"""The remote facade's changes: aliases, removal, leases."""

from __future__ import annotations

from collections.abc import Sequence

from hub.arguments import checked_holder
from hub.gate import Gate, Promotion
from hub.gate_evaluation import Scores
from hub.refs import AdapterRef, Alias
from hub.remote import messages
from hub.remote.calls import RemoteCalls, parsed
from hub.splitting import checked_split
from hub.sweep import GRACE_SECONDS, RETENTION_SECONDS
from hub.versions import AliasState, Lease, Swept, Version
from protos.loraplex.v1 import registry_pb2 as pb


class RemoteChanges(RemoteCalls):
    """All of it needs the server."""

    def aliases(self, full_name: str) -> dict[str, AliasState]:
        """See `Hub.aliases`."""
        answer = self._call("Aliases", pb.AliasesRequest(full_name=parsed(full_name).full_name))
        return {alias: messages.alias_of(answer.aliases[alias]) for alias in sorted(answer.aliases)}

    def tag(self, ref: AdapterRef | str, alias: str, expect: int | None = None) -> Version:
        """See `Hub.tag`."""
        target = pb.TagRequest.Target(ref=str(parsed(ref)), weight=1)
        request = pb.TagRequest(targets=[target], alias=Alias.parse(alias).name, expect=expect)
        return self._version(self._call("Tag", request).version)

    def split(
        self, targets: Sequence[tuple[AdapterRef | str, int]], alias: str, expect: int | None = None
    ) -> AliasState:
        """See `Hub.split`."""
        checked = checked_split([(parsed(ref), weight) for ref, weight in targets])
        wanted = [pb.TagRequest.Target(ref=str(ref), weight=weight) for ref, weight in checked]
        request = pb.TagRequest(targets=wanted, alias=Alias.parse(alias).name, expect=expect, split=True)
        return messages.alias_of(self._call("Tag", request).state)

    def promote(self, ref: AdapterRef | str, alias: str, gate: Gate, scores: Scores | None = None) -> Promotion:
        """See `Hub.promote`; the server compares the numbers."""
        request = messages.gate_request(str(parsed(ref)), Alias.parse(alias).name, gate, scores)
        answer = self._call("Promote", request)
        before = self._version(answer.before) if answer.HasField("before") else None
        return Promotion(self._version(answer.version), before, tuple(answer.passed))

    def rollback(self, full_name: str, alias: str, expect: int | None = None) -> AliasState:
        """See `Hub.rollback`."""
        return messages.alias_of(self._call("Rollback", _alias_request(full_name, alias, expect)).state)

    def untag(self, full_name: str, alias: str, expect: int | None = None) -> Version:
        """See `Hub.untag`."""
        return self._version(self._call("Untag", _alias_request(full_name, alias, expect)).version)

    # Removal

    def remove(self, ref: AdapterRef | str) -> Version:
        """See `Hub.remove`."""
        return self._version(self._call("Remove", pb.RefRequest(ref=str(parsed(ref)))).version)

    def restore(self, ref: AdapterRef | str) -> Version:
        """See `Hub.restore`."""
        return self._version(self._call("Restore", pb.RefRequest(ref=str(parsed(ref)))).version)

    def sweep(
        self,
        *,
        retention_seconds: float = RETENTION_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
        dry_run: bool = False,
    ) -> Swept:
        """See `Hub.sweep`."""
        request = pb.SweepRequest(retention_seconds=retention_seconds, grace_seconds=grace_seconds, dry_run=dry_run)
        answer = self._connection.call("Sweep", request, self._actor, seconds=None)
        return Swept(tuple(answer.purged), answer.blobs, answer.leftovers, answer.bytes)

    def lease(self, ref: AdapterRef | str, holder: str, seconds: float | None = None) -> Lease:
        """See `Hub.lease`."""
        request = pb.LeaseRequest(ref=str(parsed(ref)), holder=checked_holder(holder), seconds=seconds)
        return messages.lease_of(self._call("TakeLease", request))

    def release(self, ref: AdapterRef | str, holder: str) -> None:
        """See `Hub.release`."""
        self._call("ReleaseLease", pb.LeaseRequest(ref=str(parsed(ref)), holder=checked_holder(holder)))

    def leases(self, full_name: str | None = None) -> list[Lease]:
        """See `Hub.leases`; of what the caller may read."""
        name = parsed(full_name).full_name if full_name is not None else None
        return [
            messages.lease_of(each) for each in self._call("ListLeases", pb.ListLeasesRequest(full_name=name)).leases
        ]


def _alias_request(full_name: str, alias: str, expect: int | None) -> pb.AliasRequest:
    return pb.AliasRequest(full_name=parsed(full_name).full_name, alias=Alias.parse(alias).name, expect=expect)
