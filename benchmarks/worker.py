"""A contender in a process and an interpreter of its own: nothing it patches or leaks reaches the others."""

from __future__ import annotations

import importlib
import multiprocessing
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection

from benchmarks.contender import Contender, Setup
from benchmarks.workload import Case


@dataclass(frozen=True)
class Run:
    """One timed answer to one case."""

    seconds: float
    answers: list[list[int]]


class Worker:
    """The parent's end: builds the contender at once, then runs one case at a time."""

    def __init__(self, build: str, setup: Setup, python: str = sys.executable) -> None:
        """`build`: "module:function" from `Setup` to `Contender`; `python`: the interpreter that has what it needs.

        Raises EOFError when building failed; its traceback is on stderr.
        """
        self._pipe, far = multiprocessing.Pipe()
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", str(far.fileno())], pass_fds=[far.fileno()], stdout=sys.stderr
        )
        far.close()
        self._pipe.send((build, setup))
        self._pipe.recv()

    def run(self, case: Case) -> Run:
        """Time one call; raises EOFError when the process died (its traceback is on stderr)."""
        self._pipe.send(case)
        answer: Run = self._pipe.recv()
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def _serve(pipe: Connection) -> None:
    name, setup = pipe.recv()
    module, _, function = name.partition(":")
    contender: Contender = getattr(importlib.import_module(module), function)(setup)
    pipe.send("built")
    while True:
        try:
            case: Case = pipe.recv()
        except EOFError:
            return
        start = time.perf_counter()
        answers = contender.run(case)
        pipe.send(Run(time.perf_counter() - start, answers))


if __name__ == "__main__":
    from benchmarks import worker  # what is pickled must be named as the parent names it

    worker._serve(Connection(int(sys.argv[1])))
