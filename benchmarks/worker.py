"""A contender in a process of its own: nothing it patches, caches or leaks reaches the other one."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from benchmarks.contender import Contender, Setup
from benchmarks.workload import Case

Build = Callable[[Setup], Contender]


@dataclass(frozen=True)
class Run:
    """One timed answer to one case."""

    seconds: float
    answers: list[list[int]]


class Worker:
    """The parent's end: builds the contender at once, then runs one case at a time."""

    def __init__(self, build: Build, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(far, build, setup), daemon=True)
        self._process.start()
        far.close()
        self._pipe.recv()  # built; EOFError when building failed, its traceback is on stderr

    def run(self, case: Case) -> Run:
        """Time one call; raises EOFError when the process died (its traceback is on stderr)."""
        self._pipe.send(case)
        answer: Run = self._pipe.recv()
        return answer

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, build: Build, setup: Setup) -> None:
    contender = build(setup)
    pipe.send("built")
    while True:
        try:
            case: Case = pipe.recv()
        except EOFError:
            return
        start = time.perf_counter()
        answers = contender.run(case)
        pipe.send(Run(time.perf_counter() - start, answers))
