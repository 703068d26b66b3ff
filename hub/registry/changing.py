"""The calls that change what is there: aliases, removal, leases."""

# ruff: noqa: N802  # methods are called as the calls of the proto

from __future__ import annotations

from dataclasses import replace
from typing import Final

from hub.errors import QueryInvalid
from hub.hub import Hub
from hub.refs import AdapterRef
from hub.registry.access import Access, Context, one_of
from hub.registry.grants import Caller
from hub.remote import messages
from protos.loraplex.v1 import registry_pb2 as pb

MAX_READER_SECONDS: Final = 3600.0


class ChangingCalls(Access):
    """Tag, Promote, Rollback, Untag, Remove, Restore, Sweep, TakeLease, ReleaseLease, ListLeases."""

    def Tag(self, request: pb.TagRequest, context: Context) -> pb.AliasResponse:
        """See `Hub.tag` and `Hub.split`."""
        caller = self._caller(context)
        targets = [(AdapterRef.parse(target.ref), target.weight) for target in request.targets]
        if not targets:
            raise QueryInvalid("an alias needs a version to hold")
        for ref, _ in targets:
            caller.require("promote", ref.full_name)
        expect = request.expect if request.HasField("expect") else None
        hub = self._acting(caller, context)
        if request.split:
            return pb.AliasResponse(state=messages.alias_message(hub.split(targets, request.alias, expect)))
        if len(targets) != 1:
            raise QueryInvalid("only a split alias has several targets")
        version = hub.tag(targets[0][0], request.alias, expect)
        return pb.AliasResponse(version=messages.version_message(version))

    def Promote(self, request: pb.PromoteRequest, context: Context) -> pb.PromoteResponse:
        """See `Hub.promote`."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("promote", ref.full_name)
        made = self._acting(caller, context).promote(
            ref, request.alias, messages.gate_of(request), messages.scores_of(request)
        )
        return pb.PromoteResponse(
            version=messages.version_message(made.version),
            before=messages.version_message(made.before) if made.before is not None else None,
            passed=made.passed,
        )

    def Rollback(self, request: pb.AliasRequest, context: Context) -> pb.AliasResponse:
        """See `Hub.rollback`."""
        hub, name, expect = self._alias_change(request, context)
        return pb.AliasResponse(state=messages.alias_message(hub.rollback(name, request.alias, expect)))

    def Untag(self, request: pb.AliasRequest, context: Context) -> pb.VersionResponse:
        """See `Hub.untag`."""
        hub, name, expect = self._alias_change(request, context)
        return pb.VersionResponse(version=messages.version_message(hub.untag(name, request.alias, expect)))

    def Remove(self, request: pb.RefRequest, context: Context) -> pb.VersionResponse:
        """See `Hub.remove`."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("admin", ref.full_name)
        return pb.VersionResponse(version=messages.version_message(self._acting(caller, context).remove(ref)))

    def Restore(self, request: pb.RefRequest, context: Context) -> pb.VersionResponse:
        """See `Hub.restore`."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        caller.require("admin", ref.full_name)
        return pb.VersionResponse(version=messages.version_message(self._acting(caller, context).restore(ref)))

    def Sweep(self, request: pb.SweepRequest, context: Context) -> pb.SweepResponse:
        """See `Hub.sweep`."""
        caller = self._caller(context)
        caller.require_everywhere("admin")
        if not (request.retention_seconds >= 0 and request.grace_seconds >= 0):
            raise QueryInvalid("times to keep are from 0 seconds up")
        with one_of(self._checks, "checks and sweeps"):
            swept = self._acting(caller, context).sweep(
                retention_seconds=request.retention_seconds, grace_seconds=request.grace_seconds,
                dry_run=request.dry_run,
            )  # fmt: skip
        return pb.SweepResponse(
            purged=swept.purged, blobs=swept.blobs, leftovers=swept.leftovers, bytes=swept.bytes
        )  # fmt: skip

    def TakeLease(self, request: pb.LeaseRequest, context: Context) -> pb.LeaseResponse:
        """See `Hub.lease`; who may read alone takes short leases, under a name that nobody else can take."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        seconds = request.seconds if request.HasField("seconds") else None
        holder = self._holder(caller, ref, request.holder)
        if holder != request.holder and (seconds is None or seconds > MAX_READER_SECONDS):
            caller.require("push", ref.full_name)
        lease = self._acting(caller, context).lease(ref, holder, seconds)
        return messages.lease_message(replace(lease, holder=request.holder))

    def ReleaseLease(self, request: pb.LeaseRequest, context: Context) -> pb.ReleaseLeaseResponse:
        """See `Hub.release`."""
        caller, ref = self._caller(context), AdapterRef.parse(request.ref)
        self._acting(caller, context).release(ref, self._holder(caller, ref, request.holder))
        return pb.ReleaseLeaseResponse()

    def _holder(self, caller: Caller, ref: AdapterRef, said: str) -> str:
        """Under which name this caller's leases are kept: readers cannot end or shorten what others hold."""
        if caller.may("push", ref.full_name):
            return said
        caller.require("read", ref.full_name)
        return f"{said} ({caller.subject})"

    def ListLeases(self, request: pb.ListLeasesRequest, context: Context) -> pb.ListLeasesResponse:
        """See `Hub.leases`."""
        caller, name = self._caller(context), self._asked_name(request)
        if name is not None:
            caller.require("read", name)
        found = [lease for lease in self._hub.leases(name) if caller.may("read", lease.full_name)]
        return pb.ListLeasesResponse(leases=map(messages.lease_message, found))

    def _alias_change(self, request: pb.AliasRequest, context: Context) -> tuple[Hub, str, int | None]:
        caller, name = self._caller(context), AdapterRef.parse(request.full_name).full_name
        caller.require("promote", name)
        return self._acting(caller, context), name, request.expect if request.HasField("expect") else None
