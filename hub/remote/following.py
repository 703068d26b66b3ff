"""The remote facade's events, watches and checks."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from typing import Any, Final

import grpc

from hub.errors import HubError, HubUnavailable, RefInvalid
from hub.progress import Progress
from hub.refs import AdapterRef
from hub.remote import messages
from hub.remote.calls import RemoteCalls, parsed
from hub.remote.connection import ServerAway
from hub.remote.status import error_of
from hub.versions import Event, Problem
from protos.loraplex.v1 import registry_pb2 as pb

log = logging.getLogger(__name__)
_WATCH_AHEAD: Final = 1000


class RemoteFollowing(RemoteCalls):
    """`last_seq` answers from the cache while the server is away."""

    def who_am_i(self) -> pb.WhoAmIResponse:
        """Whom the server takes this caller for, with which grants."""
        answer: pb.WhoAmIResponse = self._call("WhoAmI", pb.WhoAmIRequest())
        return answer

    def events(self, since_seq: int = 0, limit: int = 1000, full_name: str | None = None) -> list[Event]:
        """See `Hub.events`; of what the caller may read, so that numbers may be left out."""
        name = parsed(full_name).full_name if full_name is not None else None
        found: list[Event] = []
        while len(found) < limit:
            wanted = min(limit - len(found), 1000)
            request = pb.EventsRequest(since_seq=_seq(since_seq), limit=wanted, full_name=name)
            batch = list(map(messages.event_of, self._call("Events", request).events))
            found += batch
            if len(batch) < wanted:
                break
            since_seq = batch[-1].seq
        return found

    def last_seq(self) -> int:
        """See `Hub.last_seq`. While the server is away a number at which the cache was still right.

        Whoever watches from there hears of everything that changed what the cache knows.
        """
        try:
            return int(self.who_am_i().last_seq)
        except ServerAway:
            oldest = self._cache.oldest_seq()
            if oldest is None:
                raise
            log.warning("the hub's server is away; events will be followed from number %d", oldest)
            return oldest

    def watch(self, since_seq: int, stop: threading.Event, poll_seconds: float = 0.2) -> Iterator[Event]:
        """See `Hub.watch`; raises HubUnavailable when the connection ends: go on after the last event seen."""
        if stop.is_set():
            return
        arrived: queue.Queue[Event | HubError | None] = queue.Queue(_WATCH_AHEAD)
        call = self._connection.stub.Watch(
            pb.WatchRequest(since_seq=_seq(since_seq)), metadata=self._connection.metadata(self._actor)
        )
        thread = threading.Thread(target=_receive, args=(call, arrived), name="loraplex-remote-watch", daemon=True)
        thread.start()
        try:
            while not stop.is_set():
                try:
                    event = arrived.get(timeout=poll_seconds)
                except queue.Empty:
                    continue
                if event is None:
                    raise HubUnavailable("the hub's server ended the watch: it is shutting down")
                if isinstance(event, HubError):
                    raise event
                yield event
        finally:
            call.cancel()
            while thread.is_alive():  # it may wait for room
                try:
                    arrived.get(timeout=0.01)
                except queue.Empty:
                    thread.join(0.01)

    def verify(self, ref: AdapterRef | str | None = None, progress: Progress | None = None) -> list[Problem]:
        """See `Hub.verify`; the server reads its own storage."""
        text = str(parsed(ref)) if ref is not None else None
        return self._check(pb.CheckRequest(kind=pb.CheckRequest.KIND_VERIFY, ref=text), progress)

    def fsck(self, progress: Progress | None = None) -> list[Problem]:
        """See `Hub.fsck`."""
        return self._check(pb.CheckRequest(kind=pb.CheckRequest.KIND_FSCK), progress)

    def _check(self, request: pb.CheckRequest, progress: Progress | None) -> list[Problem]:
        problems = []
        for part in self._connection.stream("Check", request, self._actor):
            if part.HasField("problem"):
                problems.append(messages.problem_of(part.problem))
            elif progress is not None:
                progress(part.progress.what, part.progress.done, part.progress.total)
        return problems


def _receive(call: Any, arrived: queue.Queue[Event | HubError | None]) -> None:
    """Move a watch's events into the queue, then how it ended."""
    try:
        for message in call:
            if message.HasField("event"):
                arrived.put(messages.event_of(message.event))
        arrived.put(None)
    except grpc.RpcError as error:
        arrived.put(error_of(error))
    except HubError as error:
        arrived.put(error)


def _seq(number: int) -> int:
    if number < 0:
        raise RefInvalid("event numbers are from 0 up")
    return min(number, 2**63 - 1)
