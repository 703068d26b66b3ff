"""The calls that tell what goes on: events, watches, and long checks with their progress."""

# ruff: noqa: N802  # methods are called as the calls of the proto

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from hub.errors import QueryInvalid
from hub.progress import Progress
from hub.refs import AdapterRef
from hub.registry.access import Access, CallEnded, Context, check_wanted, one_of
from hub.remote import messages
from hub.versions import Event, Problem
from protos.loraplex.v1 import registry_pb2 as pb

MAX_EVENTS: Final = 1000
SIGN_OF_LIFE_SECONDS: Final = 5.0
PAUSE_SECONDS: Final = 0.5


class FollowingCalls(Access):
    """Events, Watch, Check."""

    def Events(self, request: pb.EventsRequest, context: Context) -> pb.EventsResponse:
        """See `Hub.events`; those of adapters that the caller may not read are left out."""
        caller, name = self._caller(context), self._asked_name(request)
        if name is not None:
            caller.require("read", name)
        limit, since = min(request.limit, MAX_EVENTS), request.since_seq
        found: list[Event] = []
        while len(found) < limit and (batch := self._hub.events(since, MAX_EVENTS, name)):
            check_wanted(context)
            found += [event for event in batch if caller.may("read", event.full_name)]
            since = batch[-1].seq
        return pb.EventsResponse(events=map(messages.event_message, found[:limit]))

    def Watch(self, request: pb.WatchRequest, context: Context) -> Iterator[pb.WatchResponse]:
        """See `Hub.watch`; ends with the token's life."""
        caller, since = self._caller(context), request.since_seq
        with one_of(self._watches, "watches"):
            self._observer.watching(1)
            try:
                yield pb.WatchResponse()
                while context.is_active() and not self.closing.is_set():
                    events = self._hub.events(since, MAX_EVENTS)
                    for event in events:
                        if caller.may("read", event.full_name):
                            yield pb.WatchResponse(event=messages.event_message(event))
                        since = event.seq
                    if not self._feed.wait_beyond(since, SIGN_OF_LIFE_SECONDS):
                        yield pb.WatchResponse()
                    elif not events:
                        self.closing.wait(PAUSE_SECONDS)  # a number, but no event: a catalog put back from a backup
                    caller = self._caller(context)  # a token revoked meanwhile ends the watch
            finally:
                self._observer.watching(-1)

    def Check(self, request: pb.CheckRequest, context: Context) -> Iterator[pb.CheckPart]:
        """See `Hub.verify` and `Hub.fsck`."""
        caller = self._caller(context)
        ref = AdapterRef.parse(request.ref) if request.HasField("ref") else None
        if request.kind == pb.CheckRequest.KIND_VERIFY and ref is not None:
            caller.require("read", ref.full_name)
            work: Callable[[Progress], list[Problem]] = lambda progress: self._hub.verify(ref, progress)  # noqa: E731
        elif request.kind in (pb.CheckRequest.KIND_VERIFY, pb.CheckRequest.KIND_FSCK) and ref is None:
            caller.require_everywhere("admin")
            work = self._hub.fsck if request.kind == pb.CheckRequest.KIND_FSCK else self._verify_all
        else:
            raise QueryInvalid("a check is verify, of a version or of all, or fsck")
        place = one_of(self._checks, "checks and sweeps")
        place.__enter__()
        yield from _told(work, context, place.__exit__)

    def _verify_all(self, progress: Progress) -> list[Problem]:
        return self._hub.verify(None, progress)


def _told(
    work: Callable[[Progress], list[Problem]], context: Context, ended: Callable[[], None]
) -> Iterator[pb.CheckPart]:
    """The work's progress as it comes, at most ten times a second, then what it found.

    Work that nobody waits for any more ends at its next sign of progress; `ended` is called when it did, not before.
    """
    told: queue.SimpleQueue[pb.CheckPart | BaseException | None] = queue.SimpleQueue()
    last = 0.0

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        check_wanted(context)
        if time.monotonic() - last > 0.1 or done == total:
            last = time.monotonic()
            told.put(pb.CheckPart(progress=pb.CheckPart.Progress(what=what, done=done, total=total)))

    def run() -> None:
        try:
            for found in work(progress):
                problem = pb.CheckPart.Problem(
                    version=found.version, file=found.file, reason=found.reason, message=found.message
                )
                told.put(pb.CheckPart(problem=problem))
            told.put(None)
        except BaseException as error:
            told.put(error)
        finally:
            ended()

    if not context.add_callback(lambda: told.put(CallEnded())):
        ended()
        raise CallEnded
    threading.Thread(target=run, name="loraplex-check", daemon=True).start()
    while (part := told.get()) is not None:
        if isinstance(part, BaseException):
            raise part
        yield part
