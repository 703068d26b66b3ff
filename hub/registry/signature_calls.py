"""The servicer's calls about signatures."""

# ruff: noqa: N802  # methods are called as the calls of the proto

from __future__ import annotations

from hub.errors import Forbidden
from hub.refs import Digest
from hub.registry.access import Access, Context
from protos.loraplex.v1 import registry_pb2 as pb


class SignatureCalls(Access):
    """Sign, Signatures."""

    def Sign(self, request: pb.SignRequest, context: Context) -> pb.SignResponse:
        """See `Hub.add_signature`; for who may push, or promote, versions of this adapter."""
        caller = self._caller(context)
        version = self._readable(caller, Digest.parse(request.digest))
        if not (caller.may("push", version.full_name) or caller.may("promote", version.full_name)):
            raise Forbidden(f"{caller.subject} has neither the role 'push' nor 'promote' for {version.full_name}")
        added = self._acting(caller, context).add_signature(version.digest, request.signature)
        return pb.SignResponse(added=added)

    def Signatures(self, request: pb.SignaturesRequest, context: Context) -> pb.SignaturesResponse:
        """See `Hub.signatures`; what the caller may not read is not found."""
        version = self._readable(self._caller(context), Digest.parse(request.digest))
        return pb.SignaturesResponse(signatures=self._hub.signatures(version.digest))
