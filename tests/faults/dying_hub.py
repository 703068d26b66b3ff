"""Runs writes on hubs in processes that kill themselves at a chosen step. Run by test_hub_crash.py, not by pytest.

    python dying_hub.py ROOT '[{"prepare": […], "writes": […], "die_at": 7}, …]'

Each case has a hub of its own, ROOT/<its position>. A write is ["push", directory, alias…], ["tag", ref, alias],
["rm", ref] or ["gc"] (with neither retention nor grace).
`prepare` is done in peace, then `writes` in a forked process that sends itself SIGKILL just before step number `die_at`
(counted from 0; null: never). Prints one JSON line a case: the steps begun and how many writes were acknowledged.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from hub.hub import Hub
from hub.location import open_local


def write(hub: Hub, verb: str, *arguments: str) -> None:
    if verb == "push":
        directory, *aliases = arguments
        hub.push(directory, "team/x", aliases=aliases)
    elif verb == "tag":
        ref, alias = arguments
        hub.tag(ref, alias)
    elif verb == "rm":
        hub.remove(arguments[0])
    else:
        hub.sweep(retention_seconds=0, grace_seconds=0)


def run(root: Path, case: dict[str, list[list[str]]], die_at: int | None, report: int) -> None:
    """The child's life; writes its steps and acknowledgements to the file descriptor `report` as they happen."""
    with Hub(*open_local(root)) as hub:
        for arguments in case["prepare"]:
            write(hub, *arguments)
    begun = 0

    def step(name: str) -> None:
        nonlocal begun
        if begun == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        begun += 1
        os.write(report, f"step {name}\n".encode())

    with Hub(*open_local(root, step=step)) as hub:
        for arguments in case["writes"]:
            write(hub, *arguments)
            os.write(report, b"acknowledged\n")


def main() -> None:
    root = Path(sys.argv[1])
    for position, case in enumerate(json.loads(sys.argv[2])):
        reader, report = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            run(root / str(position), case, case["die_at"], report)
            os._exit(0)
        os.close(report)
        with os.fdopen(reader) as lines:
            told = lines.read().splitlines()
        _, status = os.waitpid(child, 0)
        steps = [line.removeprefix("step ") for line in told if line.startswith("step ")]
        outcome = {"killed": os.WIFSIGNALED(status), "steps": steps, "acknowledged": told.count("acknowledged")}
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
