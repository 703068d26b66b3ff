"""Processes that do things to one hub at the same moment."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

WORKER = """
import json, sys
from hub.errors import HubError
from hub.hub import Hub

url, verb, *rest = sys.argv[1:]
with Hub.open(url) as hub:
    print("ready", flush=True)
    sys.stdin.readline()
    for argument in rest:
        try:
            if verb == "push":
                result = hub.push(argument, "team/x")
                version = result.version
                told = {"number": version.number, "created": result.created, "digest": version.digest}
                print(json.dumps(told), flush=True)
            elif verb == "churn":  # push, let go of it, push it again: as hostile to a sweep as can be
                number = hub.push(argument, "team/y:mine").version.number
                hub.untag("team/y", "mine")
                try:
                    hub.remove(f"team/y@{number}")
                except HubError:
                    pass  # :latest holds it
                print(json.dumps({"churned": number}), flush=True)
            elif verb == "sweep":
                swept = hub.sweep(retention_seconds=0, grace_seconds=0)
                print(json.dumps({"blobs": swept.blobs}), flush=True)
            elif verb == "watch":
                import threading
                from itertools import islice
                seqs = [event.seq for event in islice(hub.watch(0, threading.Event(), 0.01), int(argument))]
                print(json.dumps({"seqs": seqs}), flush=True)
            else:
                version, expect = argument.split(":")
                hub.tag(f"team/x@{version}", "prod", expect=int(expect))
                print(json.dumps({"moved_to": int(version)}), flush=True)
        except HubError as error:
            print(json.dumps({"reason": error.reason, "message": str(error)}), flush=True)
"""


def race(url: str, argument_lists: list[list[str]], seconds: float = 80) -> list[list[dict[str, Any]]]:
    """Run one worker process a list, all let go at the same moment, for at most `seconds` each; what each printed."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, url, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for arguments in argument_lists
    ]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        outputs = []
        for worker in workers:
            out, _ = worker.communicate(timeout=seconds)
            assert worker.returncode == 0
            outputs.append([json.loads(line) for line in out.splitlines()])
        return outputs
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
