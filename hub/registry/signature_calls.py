"""The servicer's calls about signatures."""

# ruff: noqa: N802  # methods are called as the calls of the proto

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from hub.errors import Forbidden
from hub.hub import Hub
from hub.refs import Digest
from hub.registry.grants import Caller
from protos.loraplex.v1 import registry_pb2 as pb

if TYPE_CHECKING:
    from hub.versions import Version


class SignatureCalls:
    """The part of `hub.registry.service.RegistryService` that is about signatures."""

    _hub: Hub

    def Sign(self: Any, request: pb.SignRequest, context: grpc.ServicerContext) -> pb.SignResponse:
        """See `Hub.add_signature`; for who may push, or promote, versions of this adapter."""
        caller: Caller = self._caller(context)
        version: Version = self._readable(caller, Digest.parse(request.digest))
        if not (caller.may("push", version.full_name) or caller.may("promote", version.full_name)):
            raise Forbidden(f"{caller.subject} has neither the role 'push' nor 'promote' for {version.full_name}")
        added = self._acting(caller, context).add_signature(version.digest, request.signature)
        return pb.SignResponse(added=added)

    def Signatures(self: Any, request: pb.SignaturesRequest, context: grpc.ServicerContext) -> pb.SignaturesResponse:
        """See `Hub.signatures`; what the caller may not read is not found."""
        version: Version = self._readable(self._caller(context), Digest.parse(request.digest))
        return pb.SignaturesResponse(signatures=self._hub.signatures(version.digest))
