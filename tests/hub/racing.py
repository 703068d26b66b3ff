"""Processes that do things to one hub at the same moment."""

from __future__ import annotations

import multiprocessing
import os
import threading
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

from hub.errors import HubError
from hub.hub import Hub

Told = dict[str, Any]
# Every worker is a process of its own, forked from one that has imported the hub and done nothing else.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.hub.racing"])


def race(url: str, argument_lists: list[list[str]], seconds: float = 80) -> list[list[Told]]:
    """Run one worker process a list, all let go at the same moment, for at most `seconds` each; what each told."""
    workers = []
    for arguments in argument_lists:
        ours, theirs = _PROCESSES.Pipe()
        process = _PROCESSES.Process(target=_work, args=(theirs, dict(os.environ), url, *arguments), daemon=True)
        process.start()
        theirs.close()
        workers.append((process, ours))
    try:
        for _, pipe in workers:
            assert pipe.recv() == "ready"
        for _, pipe in workers:
            pipe.send("go")
        outputs = []
        for process, pipe in workers:
            assert pipe.poll(seconds)
            outputs.append(pipe.recv())
            process.join(seconds)
            assert process.exitcode == 0
        return outputs
    finally:
        for process, pipe in workers:
            process.kill()
            process.join()
            pipe.close()


def _work(pipe: Connection, environment: dict[str, str], url: str, verb: str, *rest: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    told: list[Told] = []
    with Hub.open(url) as hub:
        pipe.send("ready")
        pipe.recv()
        for argument in rest:
            try:
                told.append(_do(hub, verb, argument))
            except HubError as error:
                told.append({"reason": error.reason, "message": str(error)})
    pipe.send(told)


def _do(hub: Hub, verb: str, argument: str) -> Told:
    if verb == "push":
        result = hub.push(argument, "team/x")
        version = result.version
        return {"number": version.number, "created": result.created, "digest": version.digest}
    if verb == "churn":  # push, let go of it, push it again: as hostile to a sweep as can be
        number = hub.push(argument, "team/y:mine").version.number
        hub.untag("team/y", "mine")
        with suppress(HubError):  # :latest holds it
            hub.remove(f"team/y@{number}")
        return {"churned": number}
    if verb == "sweep":
        return {"blobs": hub.sweep(retention_seconds=0, grace_seconds=0).blobs}
    if verb == "watch":
        return {"seqs": [event.seq for event in islice(hub.watch(0, threading.Event(), 0.01), int(argument))]}
    version, expect = argument.split(":")
    hub.tag(f"team/x@{version}", "prod", expect=int(expect))
    return {"moved_to": int(version)}
