"""Runs writes on hubs in processes that kill themselves at a chosen step. Run by the crash tests, not by pytest.

    python dying_hub.py ROOT '[{"prepare": […], "writes": […], "die_at": 7}, …]'
    python dying_hub.py --same ROOT '[[7, ["push", …], ["gc"], …], …]'

Each case has a hub of its own, ROOT/<its position>; with --same all lives are spent on the hub ROOT. A write is
["push", directory, alias…], ["tag", ref, alias], ["rm", ref or "oldest"] or ["gc"] (with neither retention nor grace).
`prepare` is done in peace, then `writes` in a forked process that sends itself SIGKILL just before step number `die_at`
(counted from 0; null: never). Prints one JSON line a case: the steps begun and how many writes were acknowledged; with
--same also what was pushed, and the versions that acknowledged or cut removals may have taken.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub.errors import HubError
from hub.hub import Hub
from hub.location import open_local


def write(hub: Hub, verb: str, *arguments: str) -> dict[str, Any]:
    if verb == "push":
        directory, *aliases = arguments
        return {"directory": directory, "number": hub.push(directory, "team/x", aliases=aliases).version.number}
    if verb == "tag":
        ref, alias = arguments
        hub.tag(ref, alias)
    elif verb == "rm":
        hub.remove(arguments[0])
    else:
        hub.sweep(retention_seconds=0, grace_seconds=0)
    return {}


def step_that_kills(die_at: int | None, report: int) -> Callable[[str], None]:
    begun = 0

    def step(name: str) -> None:
        nonlocal begun
        if begun == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        begun += 1
        os.write(report, f"step {name}\n".encode())

    return step


def run(root: Path, case: dict[str, list[list[str]]], die_at: int | None, report: int) -> None:
    """The child's life; writes its steps and acknowledgements to the file descriptor `report` as they happen."""
    with Hub(*open_local(root)) as hub:
        for arguments in case["prepare"]:
            write(hub, *arguments)
    with Hub(*open_local(root, step=step_that_kills(die_at, report))) as hub:
        for arguments in case["writes"]:
            write(hub, *arguments)
            os.write(report, b"acknowledged\n")


def spend(root: Path, writes: list[list[str]], die_at: int, report: int) -> None:
    """One life on a hub that others died on before."""
    with Hub(*open_local(root, step=step_that_kills(die_at, report))) as hub:
        for verb, *arguments in writes:
            if arguments == ["oldest"]:
                arguments = [f"team/x@{hub.versions('team/x')[0].number}"]
                os.write(report, f"removing {arguments[0].partition('@')[2]}\n".encode())
            try:
                done = write(hub, verb, *arguments)
            except HubError as error:
                assert error.reason in ("VERSION_HELD", "ALIAS_NOT_FOUND"), error
                continue
            os.write(report, f"acknowledged {json.dumps(done)}\n".encode())


def live(work: Callable[[int], None]) -> dict[str, Any]:
    """Do the work in a forked process; what it told before its end."""
    reader, report = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        work(report)
        os._exit(0)
    os.close(report)
    with os.fdopen(reader) as lines:
        told = lines.read().splitlines()
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, told
    acknowledged = [line.removeprefix("acknowledged") for line in told if line.startswith("acknowledged")]
    return {
        "killed": os.WIFSIGNALED(status),
        "steps": [line.removeprefix("step ") for line in told if line.startswith("step ")],
        "acknowledged": len(acknowledged),
        "pushed": [done for text in acknowledged if text and (done := json.loads(text))],
        "may be gone": [int(line.removeprefix("removing ")) for line in told if line.startswith("removing ")],
    }


def main() -> None:
    if sys.argv[1] == "--same":
        root = Path(sys.argv[2])
        for die_at, *writes in json.loads(sys.argv[3]):
            print(json.dumps(live(lambda report: spend(root, writes, die_at, report))), flush=True)  # noqa: B023
        return
    root = Path(sys.argv[1])
    for position, case in enumerate(json.loads(sys.argv[2])):
        place = root / str(position)
        print(json.dumps(live(lambda report: run(place, case, case["die_at"], report))), flush=True)  # noqa: B023


if __name__ == "__main__":
    main()
